"""Draws docs/results/gain.png from docs/results/trials.csv: when does the distillation gain MAP@R?

A trial is one run, measured after its last epoch on training classes that were held out. Its gain is the difference to
``none`` on the same data, with the same rates, weight decay, epochs and seed. Filled points are
seed 0; open ones are means of three seeds with 95 % intervals.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

RESULTS = Path(__file__).parent / "results"
COLOURS = {"obdsd": "#0072B2", "uniform": "#D55E00"}
STUDIES = {"cub100": ("birds", "1e-05", "o"), "grocery": ("groceries", "3e-05", "^"), "cars": ("cars", "0.0003", "s")}
"""Data -> its name, the rate that was chosen, and a marker."""
SAME = ("data", "lr", "head_scale", "weight_decay", "epochs", "samples_per_class", "seed")
USUAL = {
    "temperature": "0.1", "transition_temperature": "0.05", "omega": "0.5", "head_scale": "30.0",
    "weight_decay": "0.0004", "samples_per_class": "4", "memory": "", "epochs": "12",
}  # fmt: skip
Points = defaultdict[float, list[float]]


def main() -> None:
    with (RESULTS / "trials.csv").open() as file:
        trials = [trial for trial in csv.DictReader(file) if trial["lr"] == STUDIES[trial["data"]][1]]
    baselines = {tuple(t[name] for name in SAME): float(t["last_map_at_r"]) for t in trials if t["target"] == "none"}
    figure = Figure(figsize=(12, 8.8), layout="constrained")
    by_weight, by_transition, by_flatness, by_length = panels = figure.subplots(2, 2).ravel()
    for data, (name, _, marker) in STUDIES.items():
        for target, colour in COLOURS.items():
            style = {"color": colour, "marker": marker, "markersize": 5, "label": f"{target}, {name}"}
            weights, sharp_weights, transitions, lengths = (Points(list) for _ in range(4))
            flatness = []
            for t in trials:
                if (t["data"], t["target"]) != (data, target):
                    continue
                gain = float(t["last_map_at_r"]) - baselines[tuple(t[name] for name in SAME)]
                unusual = {name for name, value in USUAL.items() if t[name] not in (value, "")}
                if "epochs" not in unusual:
                    flatness.append((max(float(t["mean_kl_to_uniform"]), 1e-3), gain))
                if not unusual:
                    weights[float(t["weight"])].append(gain)
                if unusual == {"transition_temperature"} and t["transition_temperature"] == "0.01":
                    sharp_weights[float(t["weight"])].append(gain)
                if target == "obdsd" and t["weight"] == "10.0":
                    if unusual <= {"transition_temperature"}:
                        transitions[float(t["transition_temperature"])].append(gain)
                    if unusual <= {"epochs"}:
                        lengths[int(t["epochs"])].append(gain)
            draw(by_weight, weights, style)
            draw(by_weight, sharp_weights, style | {"linestyle": "--", "label": f"{style['label']}, sharp"})
            if flatness:
                by_flatness.plot(*zip(*flatness, strict=True), linestyle="none", **style)
            for axes, points in ((by_transition, transitions), (by_length, lengths)):
                if len(points) > 1:
                    draw(axes, points, style)
    by_weight.set(xscale="log", ylim=(-0.09, 0.06), xlabel="weight (sharp: transition temperature 0.01, else 0.05)")
    by_transition.set(xscale="log", xlabel="transition temperature, at weight 10")
    by_flatness.set(xscale="log", xlabel="KL of the target to uniform in nats (0.001: less)")
    by_length.set(xlabel="epochs, at weight 10", xticks=(4, 12, 24))
    figure.supylabel("gain in MAP@R on held-out classes")
    for axes in panels:
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if axes is by_weight else "best")
    figure.savefig(RESULTS / "gain.png", dpi=110)


def draw(axes: Any, gains: Points, style: dict[str, Any]) -> None:
    """Draw seed 0, which comes first, and where there are three seeds their mean with Student's 95 % interval."""
    if not gains:
        return
    x = sorted(gains)
    axes.plot(x, [gains[at][0] for at in x], **style)
    for at in x:
        if (n := len(gains[at])) > 2:
            half = stats.t.ppf(0.975, n - 1) * np.std(gains[at], ddof=1) / np.sqrt(n)
            form = {"fmt": style["marker"], "ms": 9, "mfc": "none", "capsize": 3, "linewidth": 0.9}
            axes.errorbar(at, np.mean(gains[at]), half, color=style["color"], **form)


if __name__ == "__main__":
    main()
