"""Figure of a comparison: seeds, means, and differences to the baseline."""

import io
from collections.abc import Mapping
from typing import Any

from dist_obdsd.experiments.statistics import FEWEST, spread

DOT, MEAN = "#7a9cc6", "#1f2a44"


def draw(title: str, panels: Mapping[str, Mapping[str, Mapping[int, float]]], baselines: Mapping[str, str]) -> bytes:
    """Draw a PNG: metrics side by side, and below them the differences.

    Args:
        panels: metric -> variant -> seed -> value.
        baselines: variant -> the variant that it is compared with.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for variants in panels.values() for label, found in variants.items() if found))
    compared = [label for label in labels if baselines.get(label) in labels]
    heights = [len(labels), len(compared)] if compared else [len(labels)]
    size = (5.2 * len(panels) + 0.6, 1.9 + 0.42 * sum(heights) + 0.6 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(heights), len(panels), squeeze=False, height_ratios=[h + 1 for h in heights])
    for column, (metric, values) in enumerate(panels.items()):
        _draw(grid[0][column], metric, {label: values[label] for label in labels}, column == 0, ".4f")
        if compared:
            names = ", ".join(dict.fromkeys(baselines[label] for label in compared))
            differences = {label: _minus(values[label], values[baselines[label]]) for label in compared}
            _draw(grid[1][column], f"difference to {names}, seed by seed", differences, column == 0, "+.4f")
            grid[1][column].axvline(0, color="#888888", linewidth=1, zorder=0)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(f"dots: seeds; bar: mean and its 95 % interval (Student's t) from {FEWEST} seeds on", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _minus(values: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    return {seed: value - base[seed] for seed, value in values.items() if seed in base}


def _draw(axes: Any, title: str, variants: Mapping[str, Mapping[int, float]], named: bool, form: str) -> None:
    """Draw each variant's seeds slightly above its mean and interval."""
    for row, values in enumerate(variants.values()):
        if values:
            of = spread(list(values.values()))
            axes.scatter(values.values(), [row - 0.16] * len(values), s=34, color=DOT, edgecolor="white", zorder=2)
            style = {"fmt": "|", "markersize": 11, "markeredgewidth": 2, "capsize": 4, "color": MEAN, "zorder": 3}
            axes.errorbar(of.mean, row + 0.16, xerr=of.half, **style)
            axes.text(of.mean, row + 0.3, f"{of.mean:{form}}", ha="center", va="top", fontsize=8, color=MEAN)
    axes.set_yticks(range(len(variants)), variants if named else [""] * len(variants))
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.12)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=6)
