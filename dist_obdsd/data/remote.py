"""Where a file of shards is, and how it comes here from a URL or a command.

The root of a set of shards is a folder, a URL, or ``pipe:`` and a shell command that writes a file to its standard
output. ``{file}`` in a URL or command stands for the file's name; without it the name follows the root and a slash.

http is read with the standard library and not, as webdataset does, with curl: curl waits for ever when a server stalls,
says a number where a person needs the cause, and a transfer that it starts anew begins with bytes that it has
already given. All else (``pipe:``, ``gs:``, ``hf:``, ``ais:``, ``sftp:``) is opened by webdataset.
"""

import hashlib
import http.client
import os
import re
import select
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from webdataset.gopen import gopen

from dist_obdsd.errors import InputError, RunError

ATTEMPTS = 5  # to download a file; counted from 1 again by one that gets further than all before
PAUSE = 1.0  # seconds before the second attempt, doubled with every further one
PATIENCE = 60.0  # seconds without a byte after which an attempt is given up
CHUNK = 2**20  # bytes
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_AGAIN = (408, 425, 429)  # of the client errors, those that may pass


def is_remote(root: str) -> bool:
    return "://" in root or root.startswith("pipe:")


def location(root: str, file: str) -> str:
    """Where a file is: a URL or ``pipe:`` command, or below a folder the absolute path.

    Raises:
        InputError: the name could do harm in a command.
    """
    if not is_remote(root):
        return str((Path(root) / file).absolute())
    if not root.startswith("pipe:"):
        file = urllib.parse.quote(file)
    elif not _SAFE.fullmatch(file):
        # The manifest comes from elsewhere, and its names end up in a shell.
        raise InputError(
            f"the manifest names the file {file!r}, which is not put into a command; names need letters, digits and "
            f"'.', '_', '-', '/'"
        )
    return root.replace("{file}", file) if "{file}" in root else f"{root.rstrip('/')}/{file}"


def shown(url: str) -> str:
    """A URL as it may stand in a message: without what could be a password or a signature."""
    if url.startswith("pipe:") or "://" not in url:
        return url
    return re.sub(r"(?<=://)[^/]*@", "", url.partition("#")[0].partition("?")[0])


def fetch(url: str, file: IO[bytes], size: int | None = None, sha256: str | None = None) -> None:
    """Write what is at ``url`` into ``file``, from its begin on, and check it.

    A transfer that breaks off goes on where it was, where the server can do that. What ``file`` raises when it is
    written to (a full disk) is passed on.

    Args:
        size: bytes that it must have; None where nobody knows.
        sha256: that it must have, in hexadecimal digits; None where nobody knows.

    Raises:
        InputError: nothing can open such a URL.
        RunError: the last of several attempts failed; the message names the URL and the cause.
    """
    for at, data in _download(url, size, sha256):
        file.seek(at)
        file.write(data)
    file.truncate()


def begin(url: str) -> bytes:
    """The first bytes, to see whether ``url`` can be read at all. There is one attempt.

    Raises:
        InputError: nothing can open such a URL.
        RunError: it cannot be read.
    """
    try:
        return next(_open(url, 0)[1], b"")
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f"cannot read {shown(url)}: {_cause(error)}; check the address and your access") from error


def _download(url: str, size: int | None, sha256: str | None) -> Iterator[tuple[int, bytes]]:
    """Pieces and where they belong. A later one for the same place replaces the earlier; at the end all is checked."""
    at = furthest = failures = 0
    digest = hashlib.sha256()
    while True:
        cost = 1
        try:
            start, pieces = _open(url, at)
            if start != at:
                at, digest = 0, hashlib.sha256()
            for data in pieces:
                yield at, data
                digest.update(data)
                at += len(data)
                if size is not None and at > size:
                    break
            if size is not None and at < size:
                raise OSError(f"the transfer ended after {at} of {size} bytes")
            wrong = f"more than the manifest's {size} bytes" if size is not None and at > size else ""
            if not wrong and sha256 is not None and digest.hexdigest() != sha256:
                wrong = f"SHA-256 {digest.hexdigest()[:12]}... where the manifest has {sha256[:12]}..."
            if not wrong:
                return
            # Seldom the network's fault, so one more attempt has to do.
            cause, cost, at, digest = f"it has {wrong}", ATTEMPTS - 1, 0, hashlib.sha256()
        except (OSError, http.client.HTTPException) as error:
            cause = _cause(error)
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in _AGAIN:
                raise RunError(f"cannot download {shown(url)}: {cause}; check the address and your access") from error
        failures = cost if at > furthest else failures + cost
        furthest = max(furthest, at)
        if failures >= ATTEMPTS:
            raise RunError(
                f"cannot download {shown(url)}: {cause}; that was the last of several attempts, so check the network "
                f"and the server and start again"
            )
        time.sleep(PAUSE * 2 ** (failures - cost))


def _cause(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"nothing came for {PATIENCE:.0f} seconds"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open(url: str, start: int) -> tuple[int, Iterator[bytes]]:
    """The place of the first byte that comes (``start``, or 0 where nothing can be skipped), and the bytes."""
    if not url.startswith(("http://", "https://")):
        return 0, _from_command(url)
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE)
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{shown(url)} is not an address that can be opened ({error}); check data.shards") from error
    return start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0, _from_server(response)


def _from_server(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with response:
        while data := response.read(CHUNK):
            yield data
        if response.length:
            raise OSError(f"the transfer ended {response.length} bytes early")


def _from_command(url: str) -> Iterator[bytes]:
    try:
        stream = gopen(url)
    except ValueError as error:
        raise InputError(
            f"nothing here opens {shown(url)}; give https://..., or a command such as "
            f"pipe:aws s3 cp s3://BUCKET/{{file}} -"
        ) from error
    # Below the stream's own buffer, since a command that hangs must not hang us.
    process = getattr(stream, "proc", None)
    handle = getattr(stream, "stream", stream).fileno()
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    try:
        while True:
            if not poll.poll(PATIENCE * 1000):
                raise TimeoutError
            if not (data := os.read(handle, CHUNK)):
                break
            yield data
    except BaseException:
        if process is not None:
            process.kill()
        with suppress(OSError):  # its exit code is our doing
            stream.close()
        raise
    try:
        stream.close()
    except OSError as error:
        raise OSError(f"its command ended with exit code {process.returncode if process else '?'}") from error
