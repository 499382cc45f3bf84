"""The example as a user starts it, on fewer images."""

import importlib
import sys

import pytest
from PIL import Image

from tests import runs


@pytest.fixture
def example(monkeypatch, capsys):
    """Run the example with arguments and return its output; with ``exits``, what it says as it ends with that code."""
    monkeypatch.syspath_prepend(runs.ROOT / "examples")
    module = importlib.import_module("search_a_folder")
    monkeypatch.setattr(module, "CLASSES", 32)
    monkeypatch.setattr(module, "CONFIG", module.CONFIG.replace("kind: none", "kind: none, figures: false"))

    def run(*arguments, exits=None):
        monkeypatch.setattr(sys, "argv", ["search_a_folder.py", *map(str, arguments)])
        if exits is None:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit, match=str(exits)):
            module.main()
        return capsys.readouterr().err

    return run


def test_it_trains_and_finds_images_of_the_query_s_class(example, tmp_path):
    asked = ("--out", tmp_path, "--epochs", "3")
    (tmp_path / "images" / "badge_07").mkdir(parents=True)
    (tmp_path / "images" / "badge_07" / "broken.png").write_bytes(b"no image")  # which must cost nothing but itself
    (tmp_path / "images" / "badge_00").mkdir()
    (tmp_path / "images" / "badge_00" / ".DS_Store").write_bytes(b"no image, and the first of its class")
    blocks = example(*asked).split("   cosine  image\n")[1:]
    for block, name in zip(blocks, ("badge_00", "badge_16"), strict=True):
        near = [line.split() for line in block.splitlines() if line.startswith("  ")]
        assert len(near) == 5
        assert all(key != f"{name}/00.png" for _, key in near)  # not the query itself
        assert sum(key.startswith(name) for _, key in near) >= 3  # by chance one of 32 would be

    # Started again on a query of the user's: nothing is trained anew, and a broken one is named.
    Image.open(tmp_path / "images" / "badge_05" / "03.png").rotate(4).save(tmp_path / "new.png")
    said = example(*asked, "--query", tmp_path / "new.png")
    assert "is finished already" in said
    assert said.split("   cosine  image\n")[1].split()[1] == "badge_05/03.png"
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert "broken.png cannot be read" in example(*asked, "--query", tmp_path / "broken.png", exits=2)
