"""The glyphs data set: letters of matplotlib's twelve DejaVu faces, drawn in grey.

A class is a character. Its images are the faces, each drawn several times with a small change of size and place.
Latin letters are for training. Greek, Cyrillic, Armenian and Georgian are for testing: scripts that were never seen.
Letters that look the same in some face (Latin A, Greek Alpha, Cyrillic A) are one class. It is a training class if one
of them is Latin.
"""

import io
import unicodedata
from collections import defaultdict
from functools import partial
from itertools import product
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from dist_obdsd.data.packing.readers.base import Reader, Sample, default_role
from dist_obdsd.rng import rng

# The DejaVu faces with letters. The two Display faces of the family hold only mathematical symbols.
FACES = tuple(
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
)
# Ranges of code points by script. Latin ends before the phonetic alphabet; of polytonic Greek, the letters with a
# breathing are in.
LATIN = ((0x0041, 0x024F),)
OTHERS = (
    *((0x0370, 0x03FF), (0x1F00, 0x1F6F)),  # Greek
    *((0x0400, 0x052F), (0xA640, 0xA69F)),  # Cyrillic
    *((0x0530, 0x058F), (0xFB13, 0xFB17)),  # Armenian
    *((0x10A0, 0x10FF), (0x2D00, 0x2D2F)),  # Georgian
)
SIDE = 32  # pixels of an image
POINTS = 20  # font size of a face's first image; 32 pixels hold all but four of the widest letters
BASELINE = 24  # row of the baseline
SIZES = (17, 18, 19, 21, 22)  # font sizes of the others
SHIFT = 2  # pixels by which the others are moved, at most, in each direction
FEWEST_FACES = 4
# Two letters look the same where the squared difference of their images, ink aligned, is at most this share of the
# ink's own square. DejaVu draws true twins (A, Alpha) alike to the bit or, where hinting rounds differently, to 1 %;
# letters that a reader tells apart differ by more than 2 %.
SAME = 0.015


class GlyphsReader(Reader):
    variants: Annotated[int, Field(ge=1, le=16)] = 2
    """Images of a letter in a face, at different sizes and places."""
    draw_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sizes and places."""

    def draw(self) -> list[Sample]:
        """Draw the set; the first variant of a letter in a face is the plain one."""
        plain = {face: _draw_face(face) for face in FACES}
        fonts = {(face, size): _font(face, size) for face in FACES for size in SIZES}
        found = []
        seen: set[bytes] = set()
        for letters in sorted(_classes(plain)):
            split = "train" if any(_inside(letter, LATIN) for letter in letters) else "test"
            class_name = f"U+{ord(letters[0]):04X}"
            for letter, face in product(letters, FACES):
                if letter not in plain[face]:
                    continue
                choice = rng(self.draw_seed, "glyphs", face, letter)
                for variant in range(self.variants):
                    ink: Ink | None = plain[face][letter]
                    dx = dy = 0
                    if variant > 0:
                        ink = _ink(fonts[face, SIZES[choice.integers(len(SIZES))]], letter)
                        dx, dy = choice.integers(-SHIFT, SHIFT + 1, size=2).tolist()
                    # Merged letters, and upright and slanted faces, can give the same bitmap: a copy in the gallery
                    # would make retrieval trivial.
                    if ink is not None and (image := _place(ink, dx, dy)).tobytes() not in seen:
                        seen.add(image.tobytes())
                        name = f"{class_name}/U+{ord(letter):04X}-{face}-{variant}.png"
                        found.append(Sample(name, class_name, split, default_role(split), partial(bytes, _png(image))))
        return found


def draw_letters(count: int) -> list[bytes]:
    """Draw the first letters of the first face as plain images: PNG bytes."""
    return [_png(_place(ink, 0, 0)) for ink in list(_draw_face(FACES[0]).values())[:count]]


Ink = tuple[Image.Image, int]  # a letter cut to its ink, and the ink's top in pixels relative to the baseline


def _inside(letter: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= ord(letter) <= last for first, last in ranges)


def _path(face: str) -> str:
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf"


def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout draws one glyph per letter, with or without the optional shaping library.
    return ImageFont.truetype(_path(face), size, layout_engine=ImageFont.Layout.BASIC)


def _ink(font: ImageFont.FreeTypeFont, letter: str) -> Ink | None:
    """Draw a letter; None where it has no ink or does not fit into an image."""
    canvas = Image.new("L", (4 * SIDE, 4 * SIDE))
    ImageDraw.Draw(canvas).text((SIDE, 2 * SIDE), letter, font=font, fill=255, anchor="ls")
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > SIDE or box[3] - box[1] > SIDE:
        return None
    return canvas.crop(box), box[1] - 2 * SIDE


def _draw_face(face: str) -> dict[str, Ink]:
    """Draw the letters of a face's character map, in code point order."""
    from matplotlib.ft2font import FT2Font

    font = _font(face, POINTS)
    letters = map(chr, sorted(FT2Font(_path(face)).get_charmap()))
    known = (x for x in letters if unicodedata.category(x).startswith("L") and _inside(x, (*LATIN, *OTHERS)))
    return {letter: ink for letter in known if (ink := _ink(font, letter)) is not None}


def _classes(plain: dict[str, dict[str, Ink]]) -> list[list[str]]:
    """Join letters that look the same in one face; keep those of enough faces."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    letters = sorted({letter for drawn in plain.values() for letter in drawn})
    number = {letter: i for i, letter in enumerate(letters)}
    twins = []
    for drawn in plain.values():
        of_face = np.array([number[letter] for letter in drawn])
        twins.append(of_face[_twins([image for image, _ in drawn.values()])])
    pairs = np.concatenate(twins)
    graph = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(letters), len(letters)))
    members = defaultdict(list)
    for letter, component in zip(letters, connected_components(graph, directed=False)[1], strict=True):
        members[component].append(letter)
    return [
        group
        for group in members.values()
        if sum(any(letter in drawn for letter in group) for drawn in plain.values()) >= FEWEST_FACES
    ]


def _twins(images: list[Image.Image]) -> np.ndarray:
    """Find pairs of images that look the same, see SAME: their numbers [n, 2]."""
    pixels = np.zeros((len(images), SIDE, SIDE))
    for row, image in zip(pixels, images, strict=True):
        row[: image.height, : image.width] = np.asarray(image)
    flat = pixels.reshape(len(images), -1)
    # Sums of whole numbers below 2^53, so that the comparison does not depend on the order of summation.
    inner = flat @ flat.T
    square = np.diag(inner)
    difference = square[:, None] + square[None, :] - 2 * inner
    return np.argwhere(np.triu(difference <= SAME * np.minimum(square[:, None], square[None, :]), 1))


def _place(ink: Ink, dx: int, dy: int) -> Image.Image:
    """Centre on a common baseline, then move by (dx, dy) with the ink inside."""
    letter, top = ink
    x = (SIDE - letter.width) // 2 + dx
    y = BASELINE + top + dy
    image = Image.new("L", (SIDE, SIDE))
    image.paste(letter, (min(max(x, 0), SIDE - letter.width), min(max(y, 0), SIDE - letter.height)))
    return image


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
