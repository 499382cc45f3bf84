"""Figure of a comparison: seeds, mean and interval, and differences to the baseline."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_obdsd.experiments.statistics import FEWEST, Spread, difference, spread

DOT, MEAN = "#7a9cc6", "#1f2a44"
MARKS = "os^Dv<>pPX*h"


@dataclass(frozen=True)
class Panel:
    metric: str
    values: Mapping[str, Mapping[int, float]]
    """Variant -> seed -> value."""


def draw(name: str, protocol: str, panels: Sequence[Panel], baselines: Mapping[str, str]) -> bytes:
    """Draw a PNG: metrics side by side, and below them the differences to the baseline.

    Args:
        baselines: variant -> the variant that it is compared with.
    """
    from matplotlib.figure import Figure

    labels = [label for label in panels[0].values if any(panel.values[label] for panel in panels)]
    compared = [label for label in labels if baselines.get(label) in labels]
    seeds = sorted({seed for panel in panels for values in panel.values.values() for seed in values})
    marks = {seed: MARKS[i % len(MARKS)] for i, seed in enumerate(seeds)}
    heights = [len(labels), len(compared)] if compared else [len(labels)]
    size = (5.2 * len(panels) + 0.6, 1.9 + 0.42 * sum(heights) + 0.6 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(heights), len(panels), squeeze=False, height_ratios=[h + 1 for h in heights])
    for column, panel in enumerate(panels):
        _finish(grid[0][column], labels, f"{panel.metric} ({protocol})", shown=column == 0)
        for row, label in enumerate(labels):
            values = panel.values[label]
            if values:
                _draw_variant(grid[0][column], row, values, spread(list(values.values())), marks, "")
        if not compared:
            continue
        names = ", ".join(dict.fromkeys(baselines[label] for label in compared))
        title = f"difference in {panel.metric} to {names}, seed by seed"
        _finish(grid[1][column], compared, title, shown=column == 0)
        grid[1][column].axvline(0, color="#888888", linewidth=1, zorder=0)
        for row, label in enumerate(compared):
            values, base = panel.values[label], panel.values[baselines[label]]
            if (found := difference(values, base)) is not None:
                each = {seed: value - base[seed] for seed, value in values.items() if seed in base}
                _draw_variant(grid[1][column], row, each, found, marks, "+")
    _add_legend(figure, marks, any(len(values) >= FEWEST for panel in panels for values in panel.values.values()))
    figure.suptitle(f"{name}: {len(seeds)} seed{'s' * (len(seeds) > 1)} per variant", fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _draw_variant(
    axes: Any, row: int, values: Mapping[int, float], of: Spread, marks: Mapping[int, str], sign: str
) -> None:
    """Draw a variant's seeds slightly above the mean and its interval."""
    for seed, value in values.items():
        axes.scatter(value, row - 0.16, marker=marks[seed], s=34, color=DOT, edgecolor="white", linewidth=0.5, zorder=2)
    style = {"fmt": "|", "markersize": 11, "markeredgewidth": 2, "capsize": 4, "color": MEAN, "zorder": 3}
    axes.errorbar(of.mean, row + 0.16, xerr=of.half, **style)
    style = {"ha": "center", "va": "top", "fontsize": 8, "color": MEAN}
    axes.text(of.mean, row + 0.3, f"{of.mean:{sign}.4f}", **style)


def _finish(axes: Any, labels: Sequence[str], title: str, shown: bool) -> None:
    axes.set_yticks(range(len(labels)), labels if shown else [""] * len(labels))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.12)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=6)


def _add_legend(figure: Any, marks: Mapping[int, str], intervals: bool) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"linestyle": "", "color": DOT, "markersize": 6}
    handles = [Line2D([], [], marker=mark, label=f"seed {seed}", **dot) for seed, mark in marks.items()][: len(MARKS)]
    label = "mean and its 95 % interval (Student's t)" if intervals else f"mean (no interval below {FEWEST} seeds)"
    handles.append(Line2D([], [], marker="|", markeredgewidth=2, markersize=10, color=MEAN, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=8.5)
