"""Addresses of shards, and downloads that are checked.

The root of a set of shards is a folder, a URL, or ``pipe:`` and a shell command that writes a file to its standard
output. ``{file}`` in a URL or command stands for the file's name; without it the name follows the root and a slash.

http is read with the standard library, since fsspec's needs aiohttp, which nothing else here does. fsspec opens every
other URL (``s3://``, ``gs://``, ``hf://``, ``sftp://``, ...), with the package that it needs for it.
"""

import base64
import errno
import hashlib
import http.client
import re
import select
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import IO, Any

import fsspec

from dist_obdsd.errors import InputError, RunError

ATTEMPTS = 5  # to download a file; counted from 1 again by one that gets further than all before
PAUSE = 1.0  # seconds before the second attempt, doubled with every further one
PATIENCE = 60.0  # seconds without a byte after which an attempt is given up
ASKING = 60.0  # seconds in which the sizes of all files are asked for
ASKERS = 16  # threads that ask
CHUNK = 2**20  # bytes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_AGAIN = (408, 425, 429)  # of the client errors, those that may pass


def is_remote(root: str) -> bool:
    return "://" in root or root.startswith("pipe:")


def location(root: str, file: str) -> str:
    """Return a file's URL or ``pipe:`` command, or its absolute path below a folder."""
    if not is_remote(root):
        return str((Path(expanduser(root)) / file).absolute())
    if root.startswith(("http://", "https://")):
        file = urllib.parse.quote(file)
    elif root.startswith("pipe:") and not _SAFE.fullmatch(file):
        # The manifest comes from elsewhere, and its names end up in a shell.
        raise InputError(
            f"the manifest names the file {file!r}, which is not put into a command; names need letters, digits and "
            f"'.', '_', '-', '/'"
        )
    return root.replace("{file}", file) if "{file}" in root else f"{root.rstrip('/')}/{file}"


def shown(url: str) -> str:
    """Return a URL for a message: without what could be a password or a signature."""
    if url.startswith("pipe:") or "://" not in url:
        return url
    return re.sub(r"(?<=://)[^/]*@", "", url.partition("#")[0].partition("?")[0])


def fetch(url: str, file: IO[bytes], size: int | None = None, sha256: str | None = None) -> None:
    """Download ``url`` into a file that is readable, too; resume what breaks off.

    Args:
        size, sha256: expected bytes and hexadecimal digest; None where nobody knows.

    Raises:
        InputError: nothing can open such a URL.
        RunError: the last of several attempts failed; the message names the URL and the cause.
        OSError: there is no room for ``file``.
    """
    at = furthest = failures = 0
    while True:
        try:
            with _opened(url, at) as (start, read):
                at = start
                while (size is None or at <= size) and (data := read()):
                    file.seek(at)
                    at += file.write(data)
            if size is not None and at != size:
                raise OSError(f"the transfer ended after {at} of {size} bytes")
            file.truncate(at)
            file.seek(0)
            digest = sha256 and hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest == sha256:
                return
            furthest, at = at, 0
            raise OSError(f"it has SHA-256 {digest} where the manifest has {sha256}")
        except Exception as error:
            if isinstance(error, InputError) or getattr(error, "errno", None) in NO_ROOM:
                raise
            cause, final = _cause(error)
        failures = 1 if at > furthest else failures + 1
        if final or failures == ATTEMPTS:
            raise RunError(
                f"cannot download {shown(url)} (attempt {failures}): {cause}; check the address, your access and the "
                f"server, and start again"
            )
        furthest = max(furthest, at)
        if size is not None and at > size:
            at = 0
        time.sleep(PAUSE * 2 ** (failures - 1))


def faults_of(places: Sequence[str], sizes: Sequence[int | None]) -> list[str | None]:
    """Find out what is wrong with files, here or elsewhere, of known or any size.

    Returns:
        For each "" or what is wrong; None where that is not known, since a server says no size, fails for now, or took
        longer than ASKING for all.

    Raises:
        InputError: nothing can open such a URL.
    """
    pool = ThreadPoolExecutor(ASKERS)
    answers = [pool.submit(_fault, place, size) for place, size in zip(places, sizes, strict=True)]
    done = wait(answers, ASKING).done
    pool.shutdown(wait=len(done) == len(answers), cancel_futures=True)
    return [answer.result() if answer in done else None for answer in answers]


def _fault(place: str, size: int | None) -> str | None:
    try:
        found = _size_of(place)
    except InputError:
        raise
    except Exception as error:
        cause, final = _cause(error)
        return cause if final or place.startswith("pipe:") else None
    if found is None:
        return None
    return "" if size is None or found in (size, -1) else f"it has {found} bytes and not {size}"


def _size_of(place: str) -> int | None:
    """Find the size of a file. A command only begins to read it, and gives -1."""
    if not is_remote(place):
        return Path(place).stat().st_size
    if place.startswith("pipe:"):
        with _opened(place, 0) as (_, read):
            read()
        return -1
    if not place.startswith(("http://", "https://")):
        system, path = _file_system(place)
        size: int | None = system.info(path)["size"]
        return size
    # Not HEAD, which signed addresses and some servers refuse.
    with _request(place, "bytes=0-0") as response:
        partly = response.status == http.HTTPStatus.PARTIAL_CONTENT
        found = response.headers["Content-Range"].rpartition("/")[2] if partly else response.headers["Content-Length"]
        return int(found) if found and found.isdecimal() else None


def _cause(error: BaseException) -> tuple[str, bool]:
    """Say why an attempt failed, and whether the next one would fail, too."""
    if isinstance(error, urllib.error.HTTPError):
        final = error.code < 500 and error.code not in _AGAIN
        return f"the server answers {error.code} {error.reason}", final
    cause = getattr(error, "reason", error)  # of a URLError
    if isinstance(cause, TimeoutError):
        return f"nothing came for {PATIENCE:.0f} seconds", False
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split()), isinstance(cause, FileNotFoundError | PermissionError)


@contextmanager
def _opened(url: str, start: int) -> Iterator[tuple[int, Callable[[], bytes]]]:
    """Open a source: the place of the first byte, and a function that reads on."""
    if url.startswith("pipe:"):
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(url[5:], shell=True, stdin=nothing, stdout=pipe, bufsize=0) as process:
            try:
                yield 0, partial(_read_command, process)
            finally:
                process.kill()
    elif url.startswith(("http://", "https://")):
        with _request(url, f"bytes={start}-" if start else None) as response:
            partly = response.status == http.HTTPStatus.PARTIAL_CONTENT
            yield start if partly else 0, partial(_read_response, response)
    else:
        system, path = _file_system(url)
        with system.open(path, "rb") as file:
            file.seek(start)
            yield start, partial(file.read, CHUNK)


def _file_system(url: str) -> tuple[Any, str]:
    """Find the fsspec file system of a URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{shown(url)} cannot be opened here ({' '.join(str(error).split())}); install that package, or give "
            f"https://... or a command such as pipe:aws s3 cp s3://BUCKET/{{file}} -"
        ) from error


def _read_command(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    poll = select.poll()  # a command that hangs must not hang us
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise TimeoutError
    data = process.stdout.read(CHUNK)
    if not data and process.wait(PATIENCE):
        raise OSError(f"its command ended with exit code {process.returncode}")
    return data


def _read_response(response: http.client.HTTPResponse) -> bytes:
    data = response.read(CHUNK)
    if not data and response.length:
        raise OSError(f"the transfer ended {response.length} bytes early")
    return data


def _request(url: str, part: str | None) -> http.client.HTTPResponse:
    try:
        address = urllib.parse.urlsplit(url)
        login, _, host = address.netloc.rpartition("@")
        request = urllib.request.Request(address._replace(netloc=host).geturl())
        if login:  # not for another server that this one may send us to
            secret = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {secret}")
        if part:
            request.add_header("Range", part)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE)
        return response
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{shown(url)} is not an address that can be opened ({error}); check data.shards") from error
