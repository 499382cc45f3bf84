"""The worst queries with what was found instead of their class, as one picture."""

from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.reading import read_shard
from dist_obdsd.data.transforms import decode
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.retrieval import Failure
from dist_obdsd.files import write_atomically

RIGHT, WRONG, QUERY = "#1a7f37", "#c62828", "#1f4e8c"
NAME_LENGTH = 18  # characters of a class name above an image
SIDE = 160  # pixels of an image in the picture


def read_images(root: str, manifest: Manifest, ids: Collection[int]) -> dict[int, bytes]:
    """The encoded images of the given ids, from the shards that hold them.

    Raises:
        InputError: the shards have no image of that id.
        RunError: a shard is broken.
    """
    wanted = set(ids)
    found: dict[int, bytes] = {}
    for shard in manifest.shards():
        if not wanted.isdisjoint(shard.ids):
            found.update(read_shard(root, shard, wanted))
    if wanted - found.keys():
        raise InputError(
            f"{root} has no image with id {min(wanted - found.keys())}; give the shards that the embeddings are of"
        )
    return found


def wrong_at_first(failures: Sequence[Failure]) -> list[Failure]:
    """Those whose nearest neighbour is of another class: where nearly all is right, the worst are no failures."""
    return [failure for failure in failures if failure.neighbour_labels[0] != failure.query_label]


def shown(failures: Sequence[Failure]) -> set[int]:
    """The ids of all images in the picture."""
    return {i for failure in failures for i in (failure.query_id, *failure.neighbour_ids)}


def draw(
    path: Path, failures: Sequence[Failure], images: Mapping[int, bytes], names: Mapping[int, str], title: str
) -> None:
    """Write the picture, one row per query; the suffix of ``path`` chooses the format.

    Left the query, in a double blue frame; then its neighbours, the nearest first. Those of the query's class have a
    solid green frame and a check mark, the others a dashed red frame and a cross.

    Args:
        failures: at least one.
        images: id -> encoded image, of all ids in ``shown(failures)``.
        names: label -> class name; a label without one is shown as a number.

    Raises:
        InputError: the suffix is not known, or an image cannot be decoded.
        RunError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 1 + max(len(failure.neighbour_ids) for failure in failures)
    figure = Figure(figsize=(1.5 * columns + 0.5, 1.78 * len(failures) + 0.9))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04))
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    grid = figure.add_gridspec(len(failures), columns + 1, width_ratios=[1, 0.12] + [1] * (columns - 1))
    for row, failure in enumerate(failures):
        ids = (failure.query_id, *failure.neighbour_ids)
        labels = (failure.query_label, *failure.neighbour_labels)
        scores = (None, *failure.neighbour_scores)
        for column, (image_id, label, score) in enumerate(zip(ids, labels, scores, strict=True)):
            axes = figure.add_subplot(grid[row, column + (column > 0)])
            try:
                pixels = _thumbnail(images[image_id])
            except ValueError as error:
                raise InputError(f"image id {image_id} cannot be decoded: {error}; repair the data") from error
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            name = _shortened(names.get(label, str(label)))
            if score is None:
                axes.set_title(f"query {image_id}\n{name}", fontsize=8.5, pad=8, color=QUERY, fontweight="bold")
                _frame(axes, QUERY, "solid", 4.5)
                continue
            right = label == failure.query_label
            colour = RIGHT if right else WRONG
            axes.set_title(f"{'✓' if right else '✗'} {score:.3f}\n{name}", fontsize=8.5, pad=5, color=colour)
            _frame(axes, colour, "solid" if right else (0, (4, 2)), 2.2)
    buffer = BytesIO()
    kind = path.suffix.removeprefix(".") or "png"
    try:
        figure.savefig(buffer, format=kind, dpi=130)
    except ValueError as error:
        raise InputError(f"{path} is of no picture format that matplotlib knows; end it in .png") from error
    write_atomically(path, buffer.getvalue())


def _frame(axes: Any, colour: str, style: Any, width: float) -> None:
    for spine in axes.spines.values():
        spine.set_position(("outward", width / 2))
        spine.set(color=colour, linewidth=width, linestyle=style, capstyle="projecting")


def _thumbnail(data: bytes) -> Any:
    """[H, W, 3] uint8, the longer side about ``SIDE`` pixels: small images by whole multiples, so that pixels stay."""
    from PIL import Image

    image = Image.fromarray(decode(data, 3).permute(1, 2, 0).numpy())
    longest = max(image.size)
    if longest > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    else:
        times = max(SIDE // longest, 1)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image


def _shortened(name: str) -> str:
    """The end of a long name says more than its begin: Alphabet_of_the_Magi/character07."""
    return name if len(name) <= NAME_LENGTH else "…" + name[-(NAME_LENGTH - 1) :]
