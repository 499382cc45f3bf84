"""``search`` on the terminal and as a page; ``serve`` as a real server that is asked over HTTP."""

import io
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
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
        # Only these are found later than a run that is not there.
        (RUN, ["--gallery", "broken"], "no image in broken can be read"),
        (RUN, ["--index", "/proc/i.npz"], "name another file with --index"),
        (RUN, ["--index", "others.npz"], "others.npz holds no index of search; name another file"),
        (RUN, ["--index", "broken/a.png"], "a.png holds no index of search; name another file"),
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
    np.savez(tmp_path / "others.npz", embeddings=np.eye(2))
    command = "serve" if "--port" in change else "search"
    query = [str(gallery / "class_00" / "0.png")] if command == "search" else []
    run = run.replace(RUN, f"{trained}/runs/tiny")
    assert main([command, run, "--gallery", str(gallery), "--index", "i.npz", *change, *query]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in last


@contextmanager
def serving(trained: Path, gallery: Path, tmp_path: Path) -> Iterator[tuple[str, Program, list[str]]]:
    """``dist-obdsd serve`` in a process of its own: its URL, the process and the lines that it said."""
    reads, writes = os.pipe()
    arguments = ["serve", f"{trained}/runs/tiny", "--gallery", str(gallery), "--port", "0", "--index", "i.npz"]
    with open(writes, "w") as out, (tmp_path / "errors").open("w") as errors:
        program = Program(arguments, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=errors)
    with open(reads) as stream:
        said: list[str] = []
        while not said or not said[-1].startswith("open http"):
            said.append(stream.readline())
            assert said[-1], (tmp_path / "errors").read_text()
        yield said[-1].split()[1], program, said
        program.kill()


def refused(answer: requests.Response, words: str) -> bool:
    return answer.status_code == 400 and words in answer.json()["error"] and "\\n" not in answer.text


def test_serve_answers_a_browser(
    trained: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gallery / "class_00" / "broken.bmp").write_bytes(b"no image")
    query = (gallery / "class_01" / "3.png").read_bytes()

    def asked(url: str, body: Any = query, **options: Any) -> requests.Response:
        return requests.post(f"{url}/search", body, timeout=60, **options)

    def paths(answer: requests.Response) -> list[str]:
        return [match["path"] for match in answer.json()["matches"]]

    with serving(trained, gallery, tmp_path) as (url, program, said):
        assert "embedding 33 images" in said[0]
        assert "32 images, 1 left out" in said[-2]
        page = requests.get(url, timeout=60).text
        assert "Drop a photo here" in page
        assert "32 images, 1 left out" in page
        assert "data:image" not in page  # the images themselves come when they are asked for
        assert '"classes": ["class_00", "class_01", "class_02", "class_03"]' in page
        found = asked(url).json()
        best, second = found["matches"][:2]
        assert (best["path"], round(best["cosine"], 4), len(found["matches"])) == ("class_01/3.png", 1.0, 24)
        assert asked(url, None, files={"file": query}).json() == found
        for size in ("", "?large=true"):
            thumbnail = requests.get(f"{url}/{second['image']}{size}", timeout=60).content
            assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
        one_class = paths(asked(url, params={"class_name": "class_02"}))
        assert {path.split("/")[0] for path in one_class} == {"class_02"}
        assert refused(asked(url, b"GIF89a"), "its format is none of")
        assert refused(asked(url, b""), "no image came")
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        assert refused(asked(url, b"--x--\r\n", headers=form), "no image came")
        assert asked(url, headers={"Content-Type": "multipart/form-data"}).status_code == 400  # without its boundary
        assert refused(asked(url, iter([query])), "Content-Length")
        assert refused(asked(url, params={"class_name": "pear"}), "no class 'pear'")
        for path in ("image/%C3%BC", "image/..%2Fi.npz"):  # one that is not in the gallery, and a way out of it
            assert refused(requests.get(f"{url}/{path}", timeout=60), "no such image")
        (gallery / "class_00" / "added.png").write_bytes(query)  # what is new in the gallery is found at once
        assert set(paths(asked(url))[:2]) == {"class_01/3.png", "class_00/added.png"}
        (gallery / "class_00" / "added.png").unlink()
        port = url.rpartition(":")[2]
        with socket.create_server(("127.0.0.2", int(port))):  # it listens at 127.0.0.1 alone
            pass
        assert main(["serve", "no/run", "--gallery", str(gallery), "--port", port]) == 2
        assert "choose another --host or --port" in capsys.readouterr().err
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0
        assert "Traceback" not in (tmp_path / "errors").read_text()
    with serving(trained, gallery, tmp_path) as (url, _, said):
        assert "embedding 1 images" in said[0]  # the broken one, which is named again
        assert "broken.bmp cannot be embedded" in (tmp_path / "errors").read_text()
        assert asked(url).json() == found
        for folder in gallery.iterdir():
            shutil.rmtree(folder)
        assert refused(asked(url), "holds no image")
        gallery.rmdir()
        assert refused(asked(url), "is not a folder")
