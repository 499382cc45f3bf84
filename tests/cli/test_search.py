"""``search`` on the terminal and as a page; ``serve`` as a real server that is asked over HTTP."""

import io
import os
import re
import shutil
import signal
import socket
from contextlib import contextmanager

import numpy as np
import pytest
import requests
from PIL import Image

import dist_obdsd
from dist_obdsd.search_index import SearchIndex
from tests import runs
from tests.nursery import Program


@pytest.fixture
def gallery(trained, tmp_path):
    """Four classes of the trained run's images, in a folder whose name is no good as HTML or as a URL."""
    folder = tmp_path / "my <b>photos</b> #1"
    for name in ("class_00", "class_01", "class_02", "class_03"):
        shutil.copytree(trained / "images" / name, folder / name)
    (folder / "class_03" / "7.png").rename(folder / "class_03" / os.fsdecode(b"\xfc.png"))
    return folder


def test_search_prints_the_nearest_and_writes_a_page(cli, trained, gallery, tmp_path):
    inside, outside = gallery / "class_01" / "0.png", trained / "images" / "class_02" / "5.png"
    (gallery / "class_02" / "5.png").unlink()
    run, page = trained / "runs" / "tiny", tmp_path / "out.html"
    options = ("--gallery", gallery, "--index", "i.npz", "--top", "5", "--html", page)
    lines = cli("search", run, *options, inside, outside, cwd=tmp_path).stdout.splitlines()
    embedder = dist_obdsd.load(run)
    for query in (inside, outside):
        others = [path for path in sorted(gallery.glob("*/*.png")) if path != query]
        cosines = embedder(others) @ embedder(query)[0]
        best = cosines.argsort(descending=True)[:5]
        start = lines.index(str(query)) + 2
        found = [line.split(None, 1) for line in lines[start : start + 5]]
        assert [name for _, name in found] == [str(others[i].relative_to(gallery)) for i in best]
        np.testing.assert_allclose([float(cosine) for cosine, _ in found], cosines[best], atol=1e-4)
    text = page.read_text()
    assert len(re.findall(r'"data:image/jpeg;base64,', text)) == 2 * (1 + 5)
    assert not re.search(r'(src|href)="(?!data:)|http:', text)  # self-contained
    assert "<b>photos" not in text


def test_the_index_follows_the_gallery(trained, gallery, tmp_path, caplog):
    def said():
        """What was logged since the last call."""
        text = caplog.text
        caplog.clear()
        return text

    caplog.set_level("INFO", "dist_obdsd")
    embedder, file = dist_obdsd.load(trained / "runs" / "tiny"), tmp_path / "cache" / "i.npz"
    first = SearchIndex(embedder, gallery, file)
    assert len(first.paths) == 32
    assert "embedding 32 images" in said()
    latin = "class_03/\\xfc.png"  # a name that is no UTF-8
    assert first.search(first.files[latin], 1)[0].path == latin
    index = SearchIndex(embedder, gallery, file)
    assert said() == ""
    assert (index.paths, index.classes) == (first.paths, [f"class_0{c}" for c in range(4)])
    query = gallery / "class_03" / "3.png"
    assert index.search(query, 3) == first.search(query, 3)
    (gallery / "class_00" / "0.png").unlink()
    shutil.copy(query, gallery / "class_01" / "new.png")
    (gallery / "class_02" / "broken.png").write_bytes(b"no image")
    os.utime(gallery / "class_02" / "1.png", (0, 0))
    index.refresh()
    assert re.search("embedding 3 images.*broken.png cannot be embedded", said(), re.DOTALL)  # and a changed one
    assert [match.path for match in index.search(query, 2)] == ["class_01/new.png", "class_03/3.png"]
    assert {match.path for match in index.search(query, 99)} == set(index.paths)
    assert (len(index.paths), index.left_out) == (32, 1)
    ninth = {f"class_01/{name}.png" for name in [*range(8), "new"]}
    assert {match.path for match in index.search(query, 99, "class_01")} == ninth
    index.refresh()
    assert said() == ""  # the broken one is remembered
    file.write_bytes(file.read_bytes()[:500])
    for network in (embedder, dist_obdsd.load(shutil.copy(embedder.path, tmp_path / "other.pt"))):
        SearchIndex(network, gallery, file)
        assert "embedding 33 images" in said()


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        # Only these are found later than a run that is not there.
        ("runs/tiny", ["--gallery", "broken"], "no image in broken can be read"),
        ("runs/tiny", ["--index", "/proc/i.npz"], "name another file with --index"),
        ("runs/tiny", ["--index", "others.npz"], "others.npz holds no index of search; name another file"),
        ("runs/tiny", ["--index", "broken/a.png"], "a.png holds no index of search; name another file"),
        ("no/run", [], "there is no checkpoint at no/run"),
        ("no/run", ["--gallery", "empty"], "holds no image"),
        ("no/run", ["--top", "0"], "--top is 0"),
        ("no/run", ["--index", "none/i.npz"], "cannot write none/i.npz"),
        ("no/run", ["none.png"], "none.png cannot be read: No such file"),
        ("no/run", ["broken/a.png"], "broken/a.png cannot be read: its format"),
    ],
)
def test_bad_requests_are_one_sentence(cli, trained, gallery, tmp_path, run, change, words):
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    np.savez(tmp_path / "others.npz", embeddings=np.eye(2))
    asked = ("search", run, "--gallery", gallery, "--index", "i.npz", *change, gallery / "class_00" / "0.png")
    assert words in cli(*asked, cwd=tmp_path, exits=2).stderr.splitlines()[-1]


@contextmanager
def serving(trained, gallery, tmp_path):
    """``dist-obdsd serve`` in a process of its own: its URL, the process and the lines that it said."""
    reads, writes = os.pipe()
    arguments = ["serve", f"{trained}/runs/tiny", "--gallery", str(gallery), "--port", "0", "--index", "i.npz"]
    with open(writes, "w") as out, (tmp_path / "errors").open("w") as errors:
        program = Program(arguments, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=errors)
    with open(reads) as stream:
        said = []
        while not said or not said[-1].startswith("open http"):
            said.append(stream.readline())
            assert said[-1], (tmp_path / "errors").read_text()
        yield said[-1].split()[1], program, said
        program.kill()


def refused(answer, words):
    return answer.status_code == 400 and words in answer.json()["error"] and "\\n" not in answer.text


def test_serve_answers_a_browser(cli, trained, gallery, tmp_path):
    (gallery / "class_00" / "broken.bmp").write_bytes(b"no image")
    query = (gallery / "class_01" / "3.png").read_bytes()

    def asked(url, body=query, **options):
        return requests.post(f"{url}/search", body, timeout=60, **options)

    def paths(answer):
        return [match["path"] for match in answer.json()["matches"]]

    with serving(trained, gallery, tmp_path) as (url, program, said):
        assert "embedding 33 images" in said[0]
        assert "32 images, 1 left out" in said[-2]
        page = requests.get(url, timeout=60).text
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
        assert {path.split("/")[0] for path in paths(asked(url, params={"class_name": "class_02"}))} == {"class_02"}
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
        for taken in (port, "99999"):
            refusal = cli("serve", "no/run", "--gallery", gallery, "--port", taken, cwd=tmp_path, exits=2)
            assert "choose another --host or --port" in refusal.stderr
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
