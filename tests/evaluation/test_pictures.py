"""The picture of the worst queries: frames by class, any kind of image, and what cannot be drawn."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import pictures
from dist_obdsd.evaluation.retrieval import Failure

MIXED = Failure("", 1, 7, (2, 3), (8, 7), (0.9, 0.25))
RIGHT = Failure("", 4, 7, (1,), (7,), (0.9,))
COLOURS = {"right": (0x1A, 0x7F, 0x37), "wrong": (0xC6, 0x28, 0x28), "query": (0x1F, 0x4E, 0x8C)}


def image(mode: str, size: tuple[int, int], kind: str) -> bytes:
    stream = io.BytesIO()
    grey = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(grey).convert(mode).save(stream, kind)
    return stream.getvalue()


IMAGES = {1: image("L", (20, 20), "PNG"), 2: image("RGB", (700, 300), "JPEG"), 3: image("P", (9, 31), "PNG"),
          4: image("1", (64, 64), "PNG")}  # fmt: skip


def colours(path: Path) -> set[str]:
    with Image.open(path) as picture:
        seen = {colour for _, colour in picture.convert("RGB").getcolors(10**7)}
    return {name for name, colour in COLOURS.items() if colour in seen}


def test_frames_tell_the_query_the_right_and_the_wrong(tmp_path: Path) -> None:
    for name, failures, expected in (
        ("mixed", [MIXED, RIGHT], {"query", "right", "wrong"}),
        ("right", [RIGHT], {"query", "right"}),
    ):
        assert pictures.shown(failures) <= IMAGES.keys()
        pictures.draw(tmp_path / f"{name}.png", failures, IMAGES, {7: "seven" * 9}, "title")
        assert colours(tmp_path / f"{name}.png") == expected


def test_only_queries_with_a_wrong_first_neighbour_are_failures() -> None:
    assert pictures.wrong_at_first([MIXED, RIGHT]) == [MIXED]


def test_the_same_picture_twice(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        pictures.draw(tmp_path / name, [MIXED], IMAGES, {}, "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture format"):
        pictures.draw(tmp_path / "a.tar", [MIXED], IMAGES, {}, "title")
    with pytest.raises(InputError, match="image id 2 cannot be decoded"):
        pictures.draw(tmp_path / "a.png", [MIXED], IMAGES | {2: b"no image"}, {}, "title")
    assert not list(tmp_path.iterdir())


def test_long_names_keep_their_end() -> None:
    assert pictures.shortened("seven") == "seven"
    shown = pictures.shortened("Alphabet_of_the_Magi/character07")
    assert len(shown) == pictures.NAME_LENGTH
    assert shown.endswith("/character07")
