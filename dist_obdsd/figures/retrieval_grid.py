"""Queries with what they found, as one picture, and how a picture becomes a file."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dist_obdsd.data.cache import Cache
from dist_obdsd.data.images import decode
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.shard_reader import image_names, read_shard
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.retrieval import RankedQuery
from dist_obdsd.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG, QUERY = "#1a7f37", "#c62828", "#1f4e8c"
LINE = 15  # characters; a class or file name above an image has two lines at most
SIDE = 160  # pixels that are drawn of an image, at most
DPI = 150
# Inches:
TITLE, MARGIN, CELL, CELL_GAP, QUERY_GAP, NAMES, HEADING = 0.62, 0.2, 1.3, 0.14, 0.22, 0.88, 0.3


def read_images(
    root: str, manifest: Manifest, ids: Collection[int], cache: Cache | None = None
) -> dict[int, tuple[bytes, str]]:
    """Read images from their shards: id -> (encoded image, name of the packed file).

    Shards that do not tell the file have the image's id in its place.

    Raises:
        InputError: the shards have no image of that id.
        RunError: a shard is broken.
    """
    wanted = set(ids)
    found: dict[int, bytes] = {}
    for shard in manifest.shards():
        if not wanted.isdisjoint(shard.ids):
            found.update(read_shard(root, shard, wanted, cache))
    if wanted - found.keys():
        raise InputError(
            f"{root} has no image with id {min(wanted - found.keys())}; give the shards that the embeddings are of"
        )
    files = image_names(root, manifest.shards(), wanted, cache)
    return {i: (data, files.get(i, f"id {i}")) for i, data in found.items()}


def wrong_at_first(failures: Iterable[RankedQuery]) -> list[RankedQuery]:
    """Keep those whose nearest neighbour is of another class."""
    return [failure for failure in failures if failure.neighbour_labels[0] != failure.query_label]


def shown(answers: Iterable[RankedQuery]) -> set[int]:
    """The ids of all images in the picture."""
    return {i for answer in answers for i in (answer.query_id, *answer.neighbour_ids)}


def retrieval_grid(
    sections: Mapping[str, Sequence[RankedQuery]],
    images: Mapping[int, tuple[bytes, str]],
    names: Mapping[int, str],
    title: str,
) -> "Figure":
    """Draw queries with what they found, one row each.

    Left the query, in a blue frame; then its neighbours, the nearest first. Those of the query's class have a solid
    green frame and a check mark, the others a dashed red frame and a cross; the number is the cosine similarity (or
    what else the search ranks by). Below stand the names of the class and of the file.

    Args:
        sections: heading -> answers, at least one in all.
        images: id -> (encoded image, its file), of all ids in the answers.
        names: label -> class name; a label without one is shown as a number.

    Raises:
        InputError: an image cannot be decoded.
    """
    from matplotlib.figure import Figure

    sections = {heading: answers for heading, answers in sections.items() if answers}
    columns = 1 + max(len(answer.neighbour_ids) for answers in sections.values() for answer in answers)
    width = 2 * MARGIN + QUERY_GAP + columns * CELL - CELL_GAP
    height = TITLE + MARGIN + len(sections) * HEADING + sum(map(len, sections.values())) * (CELL + NAMES)
    # Every place is known, so there is nothing for a layout engine to find out, which with 150 axes takes seconds.
    figure = Figure(figsize=(width, height))
    figure.text(MARGIN / width, 1 - 0.15 / height, title, fontsize=12, va="top", parse_math=False)
    top, side = TITLE, CELL - CELL_GAP  # inches from the upper edge, of an image
    for heading, answers in sections.items():
        figure.text(MARGIN / width, 1 - (top + 0.1) / height, heading, fontsize=11, fontweight="bold", va="top")
        top += HEADING
        for answer in answers:
            top += NAMES
            query = (answer.query_id, answer.query_label, None)
            found = zip(answer.neighbour_ids, answer.neighbour_labels, answer.neighbour_scores, strict=True)
            for column, (image_id, label, score) in enumerate([query, *found]):
                left = MARGIN + column * CELL + (column > 0) * QUERY_GAP
                place = (left / width, 1 - (top + side) / height, side / width, side / height)
                axes = figure.add_axes(place, xticks=[], yticks=[])
                data, file = images[image_id]
                axes.imshow(_thumbnail(image_id, data))
                style: Any = "solid"
                if score is None:
                    colour, line, mark, weight = QUERY, 4.5, "query", "bold"
                elif label == answer.query_label:
                    colour, line, mark, weight = RIGHT, 2.2, f"✓ {score:.3f}", "normal"
                else:
                    colour, line, mark, weight = WRONG, 2.2, f"✗ {score:.3f}", "normal"
                    style = (0, (4, 2))
                text = f"{mark}\n{wrapped(names.get(label, str(label)))}\n{wrapped(file.rpartition('/')[2])}"
                axes.set_title(text, fontsize=8.5, pad=5 + line / 2, color=colour, fontweight=weight, parse_math=False)
                for spine in axes.spines.values():
                    spine.set_position(("outward", line / 2))
                    spine.set(color=colour, linewidth=line, linestyle=style, capstyle="projecting")
            top += CELL
    return figure


def write(path: Path, figure: "Figure") -> None:
    """Write a figure whole or not at all; the suffix of ``path`` chooses the format.

    Raises:
        InputError: the suffix is not known.
        RunError: the file cannot be written.
    """
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path} is of no picture format that matplotlib knows; end it in .png")
    buffer = BytesIO()
    with warnings.catch_warnings():
        # Names in a script that the font lacks: their boxes are all that can be done.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=DPI)
    write_atomically(path, buffer.getvalue())


def _thumbnail(image_id: int, data: bytes) -> Image.Image:
    """Decode an image and shrink it to ``SIDE`` pixels; a small one stays as it is."""
    try:
        image = Image.fromarray(decode(data, 3).permute(1, 2, 0).numpy())
    except ValueError as error:
        raise InputError(f"image id {image_id} cannot be decoded: {error}; repair the data") from error
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def wrapped(name: str) -> str:
    """Break a name into two lines, after a word if that fits; cut a longer one."""
    if len(name) > 2 * LINE:
        name = f"{name[: LINE - 1]}…{name[-LINE:]}"
    words = re.fullmatch(rf"(.{{1,{LINE - 1}}}[-_ ])(.{{1,{LINE}}})", name)
    end = words.end(1) if words and len(name) > LINE else LINE
    return f"{name[:end]}\n{name[end:]}".rstrip("\n")
