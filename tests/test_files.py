"""A folder appears whole or not at all. Packing and exporting show the rest: failures, kills and full disks."""

from pathlib import Path

import pytest

from dist_obdsd.errors import InputError
from dist_obdsd.files import new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_in_place_of_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        for left in ("out.writing", "out.replaced"):  # by a process that was killed
            (tmp_path / left).mkdir()
            (tmp_path / left / "half a file").touch()
        with new_folder(tmp_path / "out") as folder:
            assert names(folder) == []
            (folder / text).touch()
            assert (tmp_path / "out").exists() == (text == "new")
            with pytest.raises(InputError, match="another process writes to"), new_folder(tmp_path / "out"):
                pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]
