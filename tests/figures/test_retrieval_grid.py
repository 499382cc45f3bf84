"""The picture of the worst queries: frames by class, any kind of image, and what cannot be drawn."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.retrieval import RankedQuery
from dist_obdsd.figures import retrieval_grid as pictures

MIXED = RankedQuery("", 1, 7, (2, 3), (8, 7), (0.9, 0.25))
RIGHT = RankedQuery("", 4, 7, (1,), (7,), (0.9,))
COLOURS = {"right": (0x1A, 0x7F, 0x37), "wrong": (0xC6, 0x28, 0x28), "query": (0x1F, 0x4E, 0x8C)}


def image(mode: str, size: tuple[int, int], kind: str) -> bytes:
    stream = io.BytesIO()
    grey = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(grey).convert(mode).save(stream, kind)
    return stream.getvalue()


IMAGES = {
    1: (image("L", (20, 20), "PNG"), "a/one.png"), 2: (image("RGB", (700, 300), "JPEG"), "b/two, as it was taken.jpg"),
    3: (image("P", (9, 31), "PNG"), "id 3"), 4: (image("1", (64, 64), "PNG"), "four.png"),
}  # fmt: skip


def draw(path: Path, answers: list[RankedQuery], images: dict[int, tuple[bytes, str]] = IMAGES) -> Figure:
    figure = pictures.retrieval_grid({"Worst": answers}, images, {7: "seven" * 9}, "title")
    pictures.write(path, figure)
    return figure


def frame(path: Path, figure: Figure, place: int) -> str:
    """The colour of the left edge of the frame round the picture's n-th image, as its pixels have it."""
    with Image.open(path) as picture:
        left, bottom, _, top = figure.axes[place].get_position().extents
        y = round((1 - (bottom + top) / 2) * picture.height)
        edge = round(left * picture.width)
        seen = {picture.convert("RGB").getpixel((x, at)) for x in range(edge - 6, edge) for at in range(y - 20, y + 20)}
    (name,) = [name for name, colour in COLOURS.items() if colour in seen]
    return name


def test_frames_tell_the_query_the_right_and_the_wrong(tmp_path: Path) -> None:
    assert pictures.shown([MIXED, RIGHT]) <= IMAGES.keys()
    figure = draw(tmp_path / "a.png", [MIXED, RIGHT])
    frames = [frame(tmp_path / "a.png", figure, place) for place in range(len(figure.axes))]
    assert frames == ["query", "wrong", "right", "query", "right"]
    titles = [axes.get_title() for axes in figure.axes]
    assert [title[0] for title in titles] == ["q", "✗", "✓", "q", "✓"]
    assert "0.900" in titles[1]
    assert titles[0].endswith("\nsevensevenseve…\nsevensevenseven\none.png")
    assert titles[1].endswith("\n8\ntwo, as it was \ntaken.jpg")


def test_the_images_lie_in_rows_under_their_headings(tmp_path: Path) -> None:
    figure = pictures.retrieval_grid({"Best": [RIGHT, RIGHT], "Worst": [MIXED], "None": []}, IMAGES, {}, "$a$ title")
    pictures.write(tmp_path / "a.png", figure)
    tops = [round(axes.get_position(original=True).y1, 6) for axes in figure.axes]
    assert tops == sorted(tops, reverse=True)
    assert len(set(tops)) == 3
    texts = {text.get_text(): text.get_position()[1] for text in figure.texts}
    assert list(texts) == ["$a$ title", "Best", "Worst"]
    assert texts["Best"] > tops[0] > tops[2] > texts["Worst"] > tops[-1]
    boxes = [axes.get_position(original=True) for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 > 0 and box.x1 < 1 and box.y0 > 0 for box in boxes)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture format"):
        draw(tmp_path / "a.tar", [MIXED])
    with pytest.raises(InputError, match="image id 2 cannot be decoded"):
        draw(tmp_path / "a.png", [MIXED], IMAGES | {2: (b"no image", "")})
    assert not list(tmp_path.iterdir())
