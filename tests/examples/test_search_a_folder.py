"""The example as a user starts it, on fewer images."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests import runs


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_a_folder", runs.ROOT / "examples" / "search_a_folder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CLASSES, module.CONFIG = 32, module.CONFIG.replace("kind: none", "kind: none, figures: false")
    return module


def test_it_trains_and_finds_images_of_the_query_s_class(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search_a_folder.py", "--out", str(tmp_path), "--epochs", "3"])
    (tmp_path / "images" / "badge_07").mkdir(parents=True)
    (tmp_path / "images" / "badge_07" / "broken.png").write_bytes(b"no image")  # which must cost nothing but itself
    (tmp_path / "images" / "badge_00").mkdir()
    (tmp_path / "images" / "badge_00" / ".DS_Store").write_bytes(b"no image, and the first of its class")
    example.main()
    blocks = capsys.readouterr().out.split("   cosine  image\n")[1:]
    assert len(blocks) == 2
    for block, name in zip(blocks, ("badge_00", "badge_16"), strict=True):
        near = [line.split() for line in block.splitlines() if line.startswith("  ")]
        assert len(near) == 5
        assert all(key != f"{name}/00.png" for _, key in near)  # not the query itself
        assert sum(key.startswith(name) for _, key in near) >= 3  # by chance one of 32 would be

    # Started again on a query of the user's: nothing is trained anew, and a broken one is named.
    arguments = ["search_a_folder.py", "--out", str(tmp_path), "--epochs", "3", "--query"]
    Image.open(tmp_path / "images" / "badge_05" / "03.png").rotate(4).save(tmp_path / "new.png")
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "new.png")])
    example.main()
    said = capsys.readouterr().out
    assert "is finished already" in said
    assert said.split("   cosine  image\n")[1].split()[1] == "badge_05/03.png"
    (tmp_path / "broken.png").write_bytes(b"nothing")
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "broken.png")])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert "broken.png cannot be read" in capsys.readouterr().err


def test_an_empty_folder_ends_it_with_one_sentence(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["x", "--images", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
