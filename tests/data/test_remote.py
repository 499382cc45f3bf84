import hashlib
import io
import socket
import time
import urllib.parse
from pathlib import Path

import fsspec
import pytest

from dist_obdsd.data import manifest, remote
from dist_obdsd.data.remote import faults_of, fetch, location, shown
from dist_obdsd.errors import InputError, RunError
from tests.data.server import Server, serving

DATA = bytes(range(256)) * 4096  # one MiB
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def url(server: Server) -> str:
    """The address of the data."""
    (server.folder / "a.tar").write_bytes(DATA)
    return f"{server.url}/a.tar"


def fetched(url: str, size: int | None = len(DATA), sha256: str | None = SHA256) -> bytes:
    file = io.BytesIO(b"left over" * 200_000)
    fetch(url, file, size, sha256)
    return file.getvalue()


def check_refused(fact: str, url: str, *expected: int | str) -> None:
    with pytest.raises(RunError, match=fact):
        fetched(url, *expected)


@pytest.mark.parametrize(
    ("root", "file", "found"),
    [
        ("/data", "a.tar", "/data/a.tar"),
        ("https://host/data", "deep/a b.tar", "https://host/data/deep/a%20b.tar"),
        ("https://host/{file}?key=1", "a.tar", "https://host/a.tar?key=1"),
        ("pipe:cat /data", "a.tar", "pipe:cat /data/a.tar"),
        ("pipe:aws s3 cp s3://b/{file} -", "a.tar", "pipe:aws s3 cp s3://b/a.tar -"),
        ("gs://bucket/data", "a b.tar", "gs://bucket/data/a b.tar"),
        ("~/data", "a.tar", f"{Path.home()}/data/a.tar"),
    ],
)
def test_where_a_file_is(root: str, file: str, found: str) -> None:
    assert location(root, file) == found


@pytest.mark.parametrize("file", ["a.tar; touch b", "$(id).tar", "-rf", "a b.tar", "`id`", "a'b", "a\nb"])
def test_a_manifest_cannot_bring_commands_along(file: str) -> None:
    with pytest.raises(InputError, match="not put into a command"):
        location("pipe:cat {file}", file)


def test_messages_keep_secrets() -> None:
    assert shown("https://user:password@host:1/a.tar?signature=2#x") == "https://host:1/a.tar"
    assert shown("pipe:cat /a?b") == "pipe:cat /a?b"


@pytest.mark.parametrize(
    ("faults", "ranges", "known", "percents"),
    [
        ([], True, True, [0]),
        ([], True, False, [0]),
        ([40, 503, 70], True, True, [0, 39, 39, 69]),  # goes on where it was
        ([40, 20], False, True, [0, 0, 0]),  # the server cannot go on
        ([40, 20], False, False, [0, 0, 0]),
    ],
)
def test_a_transfer_that_breaks_off_is_resumed(server: Server, url: str, faults, ranges, known, percents) -> None:
    server.ranges, server.faults["a.tar"] = ranges, faults
    assert fetched(url, *(() if known else (None, None))) == DATA
    assert [100 * start // len(DATA) for _, start in server.requests] == percents


def test_progress_earns_patience_and_none_ends_it(server: Server, url: str) -> None:
    server.faults["a.tar"] = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert fetched(url) == DATA
    server.faults["a.tar"] = [50] * 20
    check_refused(rf"cannot download {url} .*: the transfer ended .* early; ", url)
    assert len(server.requests) == 10 + remote.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "said", "attempts"), [(404, "404 Not Found", 1), (403, "403 Forbidden", 1), (503, "503 Service", 5)]
)
def test_what_will_not_pass_is_not_tried_again(server: Server, url: str, status, said, attempts) -> None:
    server.faults["a.tar"] = [status] * 9
    check_refused(rf"{url} .attempt {attempts}.: the server answers {said}", url)
    assert len(server.requests) == attempts


def test_other_bytes_than_the_manifest_s(server: Server, url: str) -> None:
    server.faults["a.tar"] = [DATA[:-1] + b"x"]
    assert fetched(url) == DATA  # once may be chance
    check_refused(r"it has SHA-256 .* where the manifest has 0{64}", url, len(DATA), "0" * 64)
    for size in (1000, len(DATA) + 1):
        check_refused(f"the transfer ended after {len(DATA)} of {size} bytes", url, size)


def test_a_server_that_stalls_or_is_gone_is_no_hang(server: Server, url: str, monkeypatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    server.faults["a.tar"] = [lambda name: time.sleep(1)]
    assert fetched(url) == DATA
    server.faults["a.tar"] = [lambda name: time.sleep(1)] * 9
    check_refused("nothing came for 0 seconds", url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        check_refused("Connection refused", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("s3://bucket/a.tar", "s3fs"),
        ("nothing://bucket/a.tar", "Protocol not known: nothing"),
        ("http://[half/a.tar", "is not an address"),
        ("http://host/a b", "is not an address"),
    ],
)
def test_what_nothing_can_open(wrong: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fetched(wrong)
    with pytest.raises(InputError, match=said):
        faults_of([wrong], [1])


@pytest.mark.parametrize("login", ["jo%40here:p%3A%2Fss%40", "token"])
def test_a_server_that_asks_for_a_password(server: Server, url: str, login: str) -> None:
    server.login = urllib.parse.unquote(login)
    with_login, wrong = (url.replace("http://", f"http://{name}@") for name in (login, "jo:wrong"))
    server.faults["a.tar"] = [40]
    assert fetched(with_login) == DATA
    assert faults_of([with_login], [len(DATA)]) == [""]
    check_refused(rf"{url} .*: the server answers 401 Unauthorized", url)
    check_refused(rf"^(?!.*wrong).*{url} .*: the server answers 401 Unauthorized", wrong)
    with serving(server.folder) as other:  # which gets no password of this one
        other.login = server.login
        server.faults["a.tar"] = [f"{other.url}/a.tar"]
        check_refused("401", with_login)


def test_fsspec_opens_other_urls(server: Server) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/a b.tar", DATA)
    assert fetched(location("memory://bucket", "a b.tar")) == DATA
    assert fetched(location(f"file://{server.folder}", "a.tar")) == DATA
    check_refused(r"memory://bucket/b.tar \(attempt 1\)", "memory://bucket/b.tar")


def test_commands(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, again = server.folder / "a.tar", tmp_path / "again"
    assert fetched(f"pipe:cat {path}") == DATA
    # A part and an error at first, all of it the second time.
    assert fetched(f"pipe:[ -e {again} ] && cat {path} || {{ touch {again}; head -c 999 {path}; exit 3; }}") == DATA
    part = f"pipe:head -c 999 {path}"
    check_refused("cannot download pipe:head -c 999 .*: its command ended with exit code 7", f"{part}; exit 7")
    check_refused(f"the transfer ended after 999 of {len(DATA)} bytes", part)
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    check_refused("nothing came for", "pipe:exec sleep 1000")


def test_a_manifest_behind_a_url(server: Server) -> None:
    with pytest.raises(InputError, match=rf"cannot download {server.url}/manifest.json .*: the server answers 404"):
        manifest.load(server.url)
    (server.folder / "manifest.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=rf"{server.url}/manifest.json is not text"):
        manifest.load(server.url)
    (server.folder / "manifest.json").write_text("{}" + " " * 1000)
    server.faults["manifest.json"] = [50, 50]
    with pytest.raises(InputError, match=rf"{server.url}/manifest.json has format None"):
        manifest.load(server.url)
