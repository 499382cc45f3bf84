"""Draws docs/results/gain.png from docs/results/trials.csv: when does the distillation gain MAP@R?

A trial is one run, measured after its last epoch on training classes that were held out. Its gain is the difference to
``none`` on the same data, with the same rate, epochs and seed.
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
COLOURS = {"obdsd": "#0072B2", "uniform": "#D55E00"}
STUDIES = {"cub100": ("birds", "1e-05", "o"), "grocery": ("groceries", "3e-05", "^")}
"""Data -> its name, the rate that was chosen, and a marker."""
SAME = ("data", "lr", "epochs", "seed")
USUAL = {"temperature": ("0.1",), "transition_temperature": ("0.05", ""), "omega": ("0.5", "")}


def main() -> None:
    with (RESULTS / "trials.csv").open() as file:
        trials = [trial for trial in csv.DictReader(file) if trial["lr"] == STUDIES[trial["data"]][1]]
    baselines = {tuple(t[name] for name in SAME): float(t["last_map_at_r"]) for t in trials if t["target"] == "none"}
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    by_weight, by_flatness, by_length = panels = figure.subplots(1, 3, sharey=True)
    for data, (name, _, marker) in STUDIES.items():
        for target, colour in COLOURS.items():
            style = {"color": colour, "marker": marker, "label": f"{target}, {name}"}
            weights, flatness, lengths = [], [], []
            for t in trials:
                if (t["data"], t["target"]) != (data, target):
                    continue
                gain = float(t["last_map_at_r"]) - baselines[tuple(t[name] for name in SAME)]
                usual = all(t[name] in values for name, values in USUAL.items())
                if t["epochs"] == "12":
                    flatness.append((max(float(t["mean_kl_to_uniform"]), 1e-3), gain))
                    weights += [(float(t["weight"]), gain)] if usual else []
                if usual and t["weight"] == "10.0" and target == "obdsd":
                    lengths.append((int(t["epochs"]), gain))
            by_weight.plot(*zip(*sorted(weights), strict=True), **style)
            by_flatness.plot(*zip(*flatness, strict=True), linestyle="none", **style)
            if len(lengths) > 1:
                by_length.plot(*zip(*sorted(lengths), strict=True), **style)
    by_weight.set(xscale="log", xlabel="weight, at temperature 0.1", ylabel="gain in MAP@R on held-out classes")
    by_flatness.set(xscale="log", xlabel="KL of the target to uniform in nats (0.001: less)")
    by_length.set(xlabel="epochs, at weight 10", xticks=(4, 8, 12))
    for axes in panels:
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(RESULTS / "gain.png", dpi=110)


if __name__ == "__main__":
    main()
