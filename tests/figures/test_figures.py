"""The figures' contents, read back from their axes, and that each is a picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dist_obdsd.figures import figures
from dist_obdsd.figures import retrieval_grid as pictures
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.targets import target_rows

SHARP = Diffusion(target="obdsd", temperature=0.1, transition_temperature=0.05, omega=0.5)


def is_picture(path: Path, figure: Figure) -> None:
    """Write it; its titles must lie within it and not on each other."""
    pictures.write(path, figure)
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
        np.testing.assert_allclose(picture.size, figure.get_size_inches() * pictures.DPI, atol=1)
    figure.draw_without_rendering()
    titles = [figure._suptitle, *(axes.title for axes in figure.axes if axes.get_title()), *figure.legends]
    boxes = [title.get_window_extent() for title in titles]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


def ideal_batch(classes: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are equal within a class and orthogonal between classes, shuffled."""
    order = torch.randperm(classes * images, generator=torch.Generator().manual_seed(1))
    labels_B = torch.arange(classes).repeat_interleave(images)[order]
    return torch.eye(classes)[labels_B], labels_B * 10


def heat_maps(figure: Figure) -> dict[str, np.ndarray]:
    """First line of a panel's title -> the matrix that it shows."""
    return {
        axes.get_title().splitlines()[0].split(" (")[0]: np.asarray(axes.images[0].get_array())
        for axes in figure.axes
        if axes.images and axes.get_title()
    }


def test_an_ideal_batch_is_blocks_of_classes(tmp_path: Path) -> None:
    T_BD, labels_B = ideal_batch(4, 3)
    figure = figures.batch_manifold(T_BD, labels_B, SHARP, "run: one batch")
    is_picture(tmp_path / "a.png", figure)
    maps = heat_maps(figure)
    assert list(maps) == ["Similarity S", "Transition A", "Target before the diffusion", "Target after the diffusion"]
    blocks = np.kron(np.eye(4), np.ones((3, 3))) > 0
    assert (maps["Similarity S"] == blocks).all()
    np.testing.assert_allclose(maps["Transition A"], (blocks - np.eye(12)) / 2, atol=1e-6)
    for name in ("Target before the diffusion", "Target after the diffusion"):
        np.testing.assert_allclose(maps[name], blocks / 3, atol=1e-3)
    assert figure.axes[1].get_title().splitlines()[1] == "itself 0%, its class 100%, others 0%"
    for axes in figure.axes[:4]:
        (frames,) = axes.collections
        assert [path.get_extents().bounds for path in frames.get_paths()] == [
            (start - 0.5, start - 0.5, 3.0, 3.0) for start in (0, 3, 6, 9)
        ]
    bars = {axes.get_ylabel() for axes in figure.axes[4:]}
    assert bars == {"cosine", "weight of the edge (grey: 0)", "probability (grey: 0)"}


def test_a_large_batch_is_shown_in_part_and_diffused_as_a_whole(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    T_BD = torch.nn.functional.normalize(torch.randn(120, 8, generator=random))
    labels_B = torch.arange(24).repeat(5)
    figure = figures.batch_manifold(T_BD, labels_B, SHARP, "run")
    shown = labels_B.argsort(stable=True)[:60]  # twelve whole classes of five
    whole_BB = target_rows(T_BD, slice(0, 120), SHARP).target_bB
    after = heat_maps(figure)["Target after the diffusion"]
    np.testing.assert_allclose(after, whole_BB[shown][:, shown], atol=1e-3)
    assert np.abs(after - heat_maps(figure)["Target before the diffusion"]).max() > 0.05
    assert "60 of 120" in figure.axes[0].get_xlabel()
    one_class = figures.batch_manifold(T_BD, torch.zeros(120, dtype=torch.int64), SHARP, "run")
    assert len(heat_maps(one_class)["Similarity S"]) == figures.SHOWN_IMAGES


@pytest.mark.parametrize(("target", "panels"), [("none", 1), ("uniform", 1), ("psd", 2), ("obdsd_symmetric", 4)])
def test_what_a_target_does_not_have_is_not_drawn(tmp_path: Path, target: Any, panels: int) -> None:
    figure = figures.batch_manifold(*ideal_batch(4, 3), replace(SHARP, target=target), "run")
    assert len(heat_maps(figure)) == panels
    is_picture(tmp_path / "a.png", figure)


def test_the_map_keeps_classes_apart_and_names_them(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels_m = torch.arange(20).repeat_interleave(12)
    rows_mD = torch.eye(20)[labels_m] + 0.05 * torch.randn(240, 20, generator=random)
    names = {0: "_hidden", 1: "$x", 2: "a$b$", 3: "Alphabet_of_the_Magi/character07 and its whole name"}
    figure = figures.embedding_map(rows_mD, labels_m, names, "run: embeddings")
    is_picture(tmp_path / "a.png", figure)
    groups = figure.axes[0].collections
    centres = np.array([np.asarray(group.get_offsets()).mean(0) for group in groups])
    for number, group in enumerate(groups):
        points = np.asarray(group.get_offsets())
        assert len(points) == 12
        assert (np.linalg.norm(points[:, None] - centres, axis=2).argmin(1) == number).all()
    looks = {(tuple(g.get_facecolor()[0]), tuple(g.get_paths()[0].vertices.ravel().round(3))) for g in groups}
    assert len(looks) == 20
    collapsed = figures.embedding_map(torch.ones(5, 1), torch.arange(5), {}, "run")
    assert np.isfinite([np.asarray(group.get_offsets()) for group in collapsed.axes[0].collections]).all()
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()][:4] == ["_hidden", r"\$x", r"a\$b\$", names[3]]


def test_the_spectrum_is_shares_beside_an_even_one(tmp_path: Path) -> None:
    figure = figures.spectrum([4.0, 1.0, 0.0], "run: spectrum")
    is_picture(tmp_path / "a.png", figure)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.8, 0.2, 1e-12])
    assert list(axes.lines[1].get_ydata()) == [1 / 3, 1 / 3]
