"""``search`` on the terminal and as a page; ``serve`` as a real server that is asked over HTTP."""

import io
import json
import os
import re
import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dist_obdsd
from dist_obdsd.cli.main import main
from dist_obdsd.inference import ImageEmbedder
from dist_obdsd.search_index import SearchIndex
from tests import runs
from tests.nursery import Program

RUN = "the trained run"


@pytest.fixture
def gallery(trained: Path, tmp_path: Path) -> Path:
    """Four classes of the trained run's images, in a folder whose name is no good as HTML or as a URL."""
    folder = tmp_path / "my <b>photos</b> #1"
    for name in ("class_00", "class_01", "class_02", "class_03"):
        shutil.copytree(trained / "images" / name, folder / name)
    latin = folder / "class_03" / os.fsdecode(b"\xfc.png")
    (folder / "class_03" / "7.png").rename(latin)
    return folder


def blocks(out: str) -> dict[str, list[tuple[float, str]]]:
    """Each query's cosines and images."""
    found = re.findall(r"^(\S.*)\n +cosine  image\n((?:  .*\n?)+)", out, re.MULTILINE)
    lines = {query: [line.split(None, 1) for line in rows.splitlines()] for query, rows in found}
    return {query: [(float(cosine), path) for cosine, path in rows] for query, rows in lines.items()}


def test_search_prints_the_nearest_and_writes_a_page(
    trained: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = gallery / "class_01" / "0.png", trained / "images" / "class_02" / "5.png"
    (gallery / "class_02" / "5.png").unlink()
    page = tmp_path / "out.html"
    asked = ["search", f"{trained}/runs/tiny", "--gallery", str(gallery), "--index", str(tmp_path / "i.npz")]
    assert main([*asked, "--top", "5", str(inside), str(outside), "--html", str(page)]) == 0
    found = blocks(capsys.readouterr().out)
    embedder = dist_obdsd.load(trained / "runs" / "tiny")
    for query in (inside, outside):
        others = [path for path in sorted(gallery.glob("*/*.png")) if path != query]
        values = (embedder(others) @ embedder(query)[0]).tolist()
        cosines = dict(zip((str(path.relative_to(gallery)) for path in others), values, strict=True))
        wanted = sorted(cosines.items(), key=lambda item: -item[1])[:5]
        assert [name for _, name in found[str(query)]] == [name for name, _ in wanted]
        np.testing.assert_allclose([value for value, _ in found[str(query)]], [value for _, value in wanted], atol=1e-4)
    text = page.read_text()
    assert len(re.findall(r'"data:image/jpeg;base64,', text)) == 2 * (1 + 5)
    assert not re.search(r'(src|href)="(?!data:)|http:', text)  # self-contained
    assert "<b>photos" not in text


def test_the_index_follows_the_gallery(
    trained: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embedded: list[str] = []
    prepare = ImageEmbedder.prepare

    def spied(self: ImageEmbedder, image: Path) -> Any:
        embedded.append(image.name)
        return prepare(self, image)

    monkeypatch.setattr(ImageEmbedder, "prepare", spied)
    embedder, file = dist_obdsd.load(trained / "runs" / "tiny"), tmp_path / "cache" / "i.npz"
    first = SearchIndex(embedder, gallery, file)
    assert len(embedded) == len(first.paths) == 32
    latin = "class_03/\\xfc.png"  # a name that is no UTF-8
    assert first.search(first.files[latin], 1)[0].path == latin
    embedded.clear()
    index = SearchIndex(embedder, gallery, file)
    assert (embedded, index.paths, index.classes) == ([], first.paths, ["class_00", "class_01", "class_02", "class_03"])
    query = gallery / "class_03" / "3.png"
    assert index.search(query, 3) == first.search(query, 3)
    embedded.clear()
    (gallery / "class_00" / "0.png").unlink()
    shutil.copy(query, gallery / "class_01" / "new.png")
    (gallery / "class_02" / "broken.png").write_bytes(b"no image")
    os.utime(gallery / "class_02" / "1.png", (0, 0))
    index.refresh()
    assert sorted(embedded) == ["1.png", "broken.png", "new.png"]
    assert "broken.png cannot be embedded" in caplog.text
    assert [match.path for match in index.search(query, 2)] == ["class_01/new.png", "class_03/3.png"]
    assert {match.path for match in index.search(query, 99)} == set(index.paths)
    assert (len(index.paths), index.left_out) == (32, 1)
    ninth = {f"class_01/{name}.png" for name in [*range(8), "new"]}
    assert {match.path for match in index.search(query, 99, "class_01")} == ninth
    embedded.clear()
    index.refresh()
    assert embedded == []  # the broken one is remembered
    caplog.clear()
    again = SearchIndex(embedder, gallery, file)  # by another start it is named again
    assert (embedded, len(again.paths), again.left_out) == (["broken.png"], 32, 1)
    assert "broken.png cannot be embedded" in caplog.text
    embedded.clear()
    file.write_bytes(file.read_bytes()[:500])
    SearchIndex(embedder, gallery, file)
    assert len(embedded) == 33
    SearchIndex(dist_obdsd.load(shutil.copy(embedder.path, tmp_path / "other.pt")), gallery, file)
    assert len(embedded) == 66


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        # Only these two are found later than a run that is not there.
        (RUN, ["--gallery", "broken"], "no image in broken can be read"),
        (RUN, ["--index", "/proc/i.npz"], "name another file with --index"),
        ("no/run", [], "there is no checkpoint at no/run"),
        ("no/run", ["--gallery", "empty"], "holds no image"),
        ("no/run", ["--gallery", "nowhere"], "nowhere is not a folder"),
        ("no/run", ["--top", "0"], "--top is 0"),
        ("no/run", ["--index", "none/i.npz"], "cannot write none/i.npz"),
        ("no/run", ["--port", "99999"], "choose another --host or --port"),
        ("no/run", ["none.png"], "none.png cannot be read: No such file"),
        ("no/run", ["broken/a.png"], "broken/a.png cannot be read: its format"),
    ],
)
def test_bad_requests_are_one_sentence(
    run: str, change: list[str], words: str, trained: Path, gallery: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    command = "serve" if "--port" in change else "search"
    query = [str(gallery / "class_00" / "0.png")] if command == "search" else []
    run = run.replace(RUN, f"{trained}/runs/tiny")
    assert main([command, run, "--gallery", str(gallery), "--index", "i.npz", *change, *query]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in last


@dataclass
class Served:
    url: str
    program: Program
    said: list[str]

    def ask(self, path: str, body: bytes | Iterator[bytes] | None = None, kind: str = "image/png") -> tuple[int, bytes]:
        try:
            asked = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def find(self, body: bytes, options: str = "", kind: str = "image/png") -> list[dict[str, Any]]:
        code, answer = self.ask(f"/search{options}", body, kind)
        assert code == 200, answer
        matches: list[dict[str, Any]] = json.loads(answer)["matches"]
        return matches


@contextmanager
def serving(trained: Path, gallery: Path, tmp_path: Path) -> Iterator[Served]:
    """``dist-obdsd serve`` in a process of its own."""
    reads, writes = os.pipe()
    arguments = ["serve", f"{trained}/runs/tiny", "--gallery", str(gallery), "--port", "0", "--index", "i.npz"]
    with open(writes, "w") as out, (tmp_path / "errors").open("w") as errors:
        program = Program(arguments, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=errors)
    with open(reads) as stream:
        said: list[str] = []
        while not said or not said[-1].startswith("open http"):
            said.append(stream.readline())
            assert said[-1], (tmp_path / "errors").read_text()
        yield Served(said[-1].split()[1], program, said)
        program.kill()


def expect_refusal(answer: tuple[int, bytes], words: str) -> None:
    assert answer[0] == 400
    assert words in json.loads(answer[1])["error"]
    assert b"\\n" not in answer[1]


def test_serve_answers_a_browser(
    trained: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gallery / "class_00" / "broken.bmp").write_bytes(b"no image")
    query = (gallery / "class_01" / "3.png").read_bytes()
    with serving(trained, gallery, tmp_path) as served:
        assert "embedding 33 images" in served.said[0]
        assert "32 images, 1 left out" in served.said[-2]
        code, page = served.ask("/")
        assert code == 200
        assert b"Drop a photo here" in page
        assert b"32 images, 1 left out" in page
        assert b"data:image" not in page  # the images themselves come when they are asked for
        assert b'"classes": ["class_00", "class_01", "class_02", "class_03"]' in page
        found = served.find(query)
        assert (found[0]["path"], round(found[0]["cosine"], 4), len(found)) == ("class_01/3.png", 1.0, 24)
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        form = head + query + b"\r\n--x--\r\n"
        assert served.find(form, kind="multipart/form-data; boundary=x") == found
        for size in ("", "?large=true"):
            assert Image.open(io.BytesIO(served.ask(f"/{found[1]['image']}{size}")[1])).format == "JPEG"
        assert {match["path"].split("/")[0] for match in served.find(query, "?class_name=class_02")} == {"class_02"}
        expect_refusal(served.ask("/search", b"GIF89a"), "its format is none of")
        expect_refusal(served.ask("/search", b""), "no image came")
        expect_refusal(served.ask("/search", b"--x--\r\n", "multipart/form-data; boundary=x"), "no image came")
        assert served.ask("/search", form, "multipart/form-data")[0] == 400  # without its boundary
        expect_refusal(served.ask("/search", iter([query])), "Content-Length")
        expect_refusal(served.ask("/search?class_name=pear", query), "no class 'pear'")
        for path in ("image/%C3%BC", "image/..%2Fi.npz"):  # one that is not in the gallery, and a way out of it
            expect_refusal(served.ask(f"/{path}"), "no such image")
        (gallery / "class_00" / "added.png").write_bytes(query)  # what is new in the gallery is found at once
        assert {match["path"] for match in served.find(query)[:2]} == {"class_01/3.png", "class_00/added.png"}
        (gallery / "class_00" / "added.png").unlink()
        port = served.url.rstrip("/").rpartition(":")[2]
        with socket.create_server(("127.0.0.2", int(port))):  # it listens at 127.0.0.1 alone
            pass
        assert main(["serve", "no/run", "--gallery", str(gallery), "--port", port]) == 2
        assert "choose another --host or --port" in capsys.readouterr().err
        served.program.send_signal(signal.SIGINT)
        assert served.program.wait(60) == 0
        assert "Traceback" not in (tmp_path / "errors").read_text()
    with serving(trained, gallery, tmp_path) as served:
        assert "embedding 1 images" in served.said[0]  # the broken one, which is named again
        assert "broken.bmp cannot be embedded" in (tmp_path / "errors").read_text()
        assert served.find(query) == found
        for path in gallery.iterdir():
            shutil.rmtree(path)
        expect_refusal(served.ask("/search", query), "holds no image")
        gallery.rmdir()
        expect_refusal(served.ask("/search", query), "is not a folder")
