"""A folder appears whole or not at all. Packing and exporting show the rest: failures, kills and full disks."""

from pathlib import Path

import pytest

from dist_obdsd.errors import InputError
from dist_obdsd.files import new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_in_place_of_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with new_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / text).write_text(text)
            assert names(tmp_path) == (["out.writing"] if text == "old" else ["out", "out.writing"])
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out" / "inner") == ["new"]


def test_only_one_process_writes_at_a_time_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "left by a kill").touch()
    (tmp_path / "out.replaced").mkdir()
    with new_folder(tmp_path / "out") as folder:
        assert names(folder) == []
        with pytest.raises(InputError, match="another process writes to"), new_folder(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"]
