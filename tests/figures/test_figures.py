"""The figures' contents, read back from their axes, and that each is a picture."""

import math
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
    title = figure.axes[1].get_title()
    assert title.splitlines()[1] == "itself 0%, its class 100%, others 0%"
    for axes in figure.axes[:4]:
        (frames,) = axes.collections
        assert [path.get_extents().bounds for path in frames.get_paths()] == [
            (start - 0.5, start - 0.5, 3.0, 3.0) for start in (0, 3, 6, 9)
        ]
    bars = [axes.get_ylabel() for axes in figure.axes[4:]]
    assert sorted(bars) == sorted(["cosine", "weight of the edge (grey: 0)", *["probability (grey: 0)"] * 2])


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


def test_recall_has_a_line_per_protocol(tmp_path: Path) -> None:
    figure = figures.recall_curves({"last": {1: 0.5, 10: 0.75, 2: 0.6}, "untrained": {1: 0.1}}, "run: Recall@k")
    is_picture(tmp_path / "a.png", figure)
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"last: 50.0, 60.0, 75.0": [[1, 50], [2, 60], [10, 75]], "untrained: 10.0": [[1, 10]]}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "10"]


def test_validation_is_drawn_over_epochs_with_the_best(tmp_path: Path) -> None:
    line = {1: 0.4, 2: 0.6, 3: 0.5}
    figure = figures.validation_curves({"recall@1": line, "map@r": line}, 2, "run")  # one hides no other
    is_picture(tmp_path / "a.png", figure)
    (axes,) = figure.axes
    *curves, best = axes.lines
    assert [dict(curve.get_xydata().tolist()) for curve in curves] == [line, line]
    assert {curve.get_linestyle() for curve in curves} == {"--"}
    assert list(best.get_xdata()) == [2, 2]


def test_the_spectrum_is_shares_beside_an_even_one(tmp_path: Path) -> None:
    figure = figures.spectrum([4.0, 1.0, 0.0], "run: spectrum")
    is_picture(tmp_path / "a.png", figure)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.8, 0.2, 1e-12])
    assert list(axes.lines[1].get_ydata()) == [1 / 3, 1 / 3]
    assert axes.get_yscale() == "log"
    assert "better" in axes.get_xlabel()


def steps() -> list[dict[str, float]]:
    rows = []
    for step in range(60):
        row: dict[str, float] = {"step": step, "epoch": step // 20, "ramp": step // 20 / 3, "lr": 0.1}
        if step != 30:
            row["ranking"] = 2 + (-1) ** step
        if step >= 20:
            row |= {"distillation": 0.5, "target_entropy": 1.0}
        rows.append(row)
    return rows


def test_losses_are_drawn_raw_and_smooth_with_the_ramp(tmp_path: Path) -> None:
    figure = figures.loss_curves(steps(), "run: losses", 16, head_scale=10)
    is_picture(tmp_path / "a.png", figure)
    ranking, rate, distillation, target, ramp = figure.axes
    raw, smooth = ranking.lines[:2]
    assert list(raw.get_xdata()) == list(range(60))
    values = np.asarray(raw.get_ydata())
    assert np.isnan(values[30])
    assert values[:2].tolist() == [3, 1]
    assert np.nanstd(smooth.get_ydata()) < np.nanstd(values) / 2
    assert list(ramp.lines[0].get_ydata()) == [step // 20 / 3 for step in range(60)]
    assert np.isnan(distillation.lines[0].get_ydata()[:20]).all()
    assert math.log(16) in target.lines[2].get_ydata()
    backbone, head, *borders = rate.lines
    np.testing.assert_allclose([backbone.get_ydata()[0], head.get_ydata()[0]], [0.1, 1.0])
    assert [line.get_xdata()[0] for line in borders] == [19.5, 39.5]
    bare = figures.loss_curves([{"step": 0, "epoch": 0, "lr": 0.1, "ranking": 1.0}], "run")
    assert [axes.get_title() for axes in bare.axes] == ["Ranking loss", "Learning rate"]
    is_picture(tmp_path / "b.png", bare)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("width", [1, 2, 7, 50])
def test_smoothing_is_the_mean_of_what_is_there(width: int) -> None:
    values = np.random.default_rng(width).normal(size=20)
    values[[0, 7, 8]] = np.nan
    padded = np.concatenate([np.full(width, np.nan), values, np.full(width, np.nan)])
    start = width - width // 2
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[start : start + 20]
    expected = np.where(np.isnan(values), np.nan, np.nanmean(windows, axis=1))
    np.testing.assert_allclose(figures.smoothed(values, width), expected)
