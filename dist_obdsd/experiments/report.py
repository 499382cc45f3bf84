"""What a comparison found: the same numbers as Markdown, CSV, JSON and a figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_obdsd.config import SELECTION_METRIC
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.errors import InputError
from dist_obdsd.experiments import plot as picture
from dist_obdsd.experiments.run_metadata import conditions
from dist_obdsd.experiments.run_status import FINISHED, Outcome
from dist_obdsd.experiments.statistics import FEWEST, Difference, Spread, difference, spread
from dist_obdsd.files import write_atomically

PROTOCOLS = {
    "best_validation": f"the epoch with the best {SELECTION_METRIC} on classes held out of training, measured once on "
    "the test set",
    "last": "after the last epoch, measured once on the test set; nothing was chosen",
    "validation": "the held-out training classes at their best epoch: to choose settings by, not to report",
    "best_test": "as in the papers: the epoch was chosen on the test set, which flatters the result",
    "untrained": "before the first step, on the test set",
}
HEADLINES = ("recall@1", SELECTION_METRIC)
"""The metrics on the terminal and in the figure, where they were measured."""

Row = dict[str, Any]


class Report:
    """Of the runs that are finished; it names those that are not."""

    def __init__(
        self,
        name: str,
        commands: Sequence[str],
        outcomes: Sequence[Outcome],
        baseline: str,
        shards: Mapping[str, Manifest],
    ) -> None:
        """
        Args:
            commands: the command line that makes the whole comparison, and one for each run.
            baseline: the arm that every other one is compared with, at the same point of the grid.
            shards: manifests by ``data.shards``.
        """
        self.name, self.commands, self.baseline, self.shards = name, commands, baseline, shards
        self.missing = [outcome for outcome in outcomes if outcome.state != FINISHED]
        self.finished = [outcome for outcome in outcomes if outcome.state == FINISHED]
        self.children = [outcome.child for outcome in outcomes]
        self.labels = list(dict.fromkeys(child.label for child in self.children))
        self.baselines = {
            child.label: f"{baseline} {child.point}".strip() for child in self.children if child.arm != baseline
        }
        self.rows = [row for outcome in self.finished for row in _rows_of(outcome)]
        measured = dict.fromkeys(row["protocol"] for row in self.rows)
        self.protocols = [name for name in PROTOCOLS if name in measured]
        self.statistics = [
            row for protocol in self.protocols for metric in self.metrics(protocol)
            for row in self._statistics(protocol, metric)
        ]  # fmt: skip

    def metrics(self, protocol: str) -> list[str]:
        return list(dict.fromkeys(row["metric"] for row in self.rows if row["protocol"] == protocol))

    def headline_metrics(self, protocol: str) -> list[str]:
        """Recall@1 and MAP@R, of the first gallery where there are several; else the first two that there are."""
        metrics = self.metrics(protocol)
        found = [next((m for m in metrics if m.rpartition("/")[2] == name), None) for name in HEADLINES]
        return [name for name in found if name is not None] or metrics[:2]

    def values(self, protocol: str, metric: str, label: str) -> dict[int, float]:
        """Seed -> value."""
        wanted = (protocol, metric, label)
        return {r["seed"]: r["value"] for r in self.rows if (r["protocol"], r["metric"], r["arm"]) == wanted}

    def _statistics(self, protocol: str, metric: str) -> list[Row]:
        rows = []
        for label in self.labels:
            values = self.values(protocol, metric, label)
            if not values:
                continue
            row: Row = {"protocol": protocol, "metric": metric, "arm": label, **_figures(spread(list(values.values())))}
            other = self.baselines.get(label)
            against = difference(values, self.values(protocol, metric, other)) if other is not None else None
            rows.append(row | {f"difference_{k}": v for k, v in _figures(against).items()} | {"baseline": other})
        return rows

    def means(self) -> dict[str, float]:
        """What a tracker shows of a comparison: mean and standard deviation per arm, metric and protocol."""
        found: dict[str, float] = {}
        for row in self.statistics:
            name = f"{row['arm'].replace('=', '_')}/{row['protocol']}/{row['metric']}"
            found |= {f"{name}/{k}": row[k] for k in ("mean", "std") if row[k] is not None}
        return found

    def meta(self) -> dict[str, Any]:
        """What stands beside the rows in a JSON file."""
        return {
            "name": self.name,
            "command": self.commands[0],
            "baseline": self.baseline,
            "runs": len(self.children),
            "finished": len(self.finished),
            "missing": [{"run": o.child.settings.name, "state": o.state, "message": o.message} for o in self.missing],
            "conditions": self.conditions(),
            "statistics": self.statistics,
        }

    def conditions(self) -> dict[str, str]:
        return conditions(self.finished, self.shards)

    # ---- files ------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> list[Path]:
        """Write report.md, report.png, values.csv and statistics.csv into a folder, which is made.

        Raises:
            RunError: it cannot be written.
        """
        make(folder)
        files = {"values.csv": _csv(self.rows), "statistics.csv": _csv(self.statistics)}
        drawn = bool(self.protocols)
        if drawn:
            protocol = self.protocols[0]
            panels = [
                picture.Panel(metric, {label: self.values(protocol, metric, label) for label in self.labels})
                for metric in self.headline_metrics(protocol)
            ]
            write_atomically(folder / "report.png", picture.draw(self.name, protocol, panels, self.baselines))
        files["report.md"] = self.markdown(drawn)
        for name, text in files.items():
            write_atomically(folder / name, text.encode())
        return [folder / name for name in (*files, *(["report.png"] if drawn else []))]

    def headline(self) -> str:
        """The first protocol's most telling metrics, as a table."""
        if not self.protocols:
            return "the runs measured nothing; set evaluation.test=true or hold out validation classes"
        return self._table(self.protocols[0], self.headline_metrics(self.protocols[0])) + self._why_no_interval()

    def markdown(self, drawn: bool) -> str:
        parts = [f"# {self.name}: a comparison of {', '.join(dict.fromkeys(c.arm for c in self.children))}"]
        parts.append(
            f"{len(self.finished)} of {len(self.children)} runs are finished. Differences are to the arm "
            f"`{self.baseline}`, seed by seed."
        )
        if self.missing:
            parts.append(
                "**These runs are missing from the numbers below:**\n\n"
                + "\n".join(f"- `{o.child.settings.name}` {o.state}: {o.message or 'no message'}" for o in self.missing)
            )
        parts.append("## Results")
        if drawn:
            parts.append("![Every seed, the means and their 95 % intervals](report.png)")
        for protocol in self.protocols:
            parts.append(f"### {protocol}\n\n{PROTOCOLS[protocol].capitalize()}.")
            parts.append(self._table(protocol, self.metrics(protocol)))
        parts.append(self._reading())
        if choice := self._choice():
            parts.append(f"## Choice of the grid's point\n\n{choice}")
        rows = [[name, value.replace("|", "\\|")] for name, value in self.conditions().items()]
        parts.append("## Conditions\n\n" + aligned(["", ""], rows, left=2))
        declared = {child.label: child.declared for child in self.children}
        arms = [[label, " ".join(f"`{setting}`" for setting in settings)] for label, settings in declared.items()]
        parts.append("## What the arms set\n\n" + aligned(["arm", "settings"], arms, left=2))
        parts.append(f"## To reproduce it\n\n{self._reproduce()}")
        return "\n\n".join(parts) + "\n"

    def _table(self, protocol: str, metrics: Sequence[str]) -> str:
        """Means, and differences to the baseline, of one protocol."""
        header = ["metric", "arm", "n", "mean", "std", "95 % interval", "difference", "95 % interval", "pairs", "p"]
        lines = []
        for row in self.statistics:
            if row["protocol"] != protocol or row["metric"] not in metrics:
                continue
            cells = [row["metric"], row["arm"], str(row["n"]), f"{row['mean']:.4f}", _number(row["std"])]
            cells.append(_interval(row["mean"], row["half"], "{:.4f}"))
            mean, half = row["difference_mean"], row["difference_half"]
            if mean is None:
                cells += ["baseline" if row["baseline"] is None else "-", "", "", ""]
            else:
                cells += [f"{mean:+.4f}", _interval(mean, half, "{:+.4f}"), str(row["difference_n"])]
                cells.append(_p(row["difference_p"]))
            lines.append(cells)
        return aligned(header, lines, left=2)

    def _why_no_interval(self) -> str:
        few = min((row["n"] for row in self.statistics), default=FEWEST)
        if few >= FEWEST:
            return ""
        return (
            f"\n\nWhere an arm has fewer than {FEWEST} finished seeds there is no interval and no p-value: so few runs "
            f"say next to nothing of how far the next one would be off."
        )

    def _reading(self) -> str:
        tests = sum(row["difference_p"] is not None for row in self.statistics)
        several = (
            f" The tables hold {tests} of them, uncorrected: of so many, about {max(1, round(0.05 * tests))} would be "
            f"below 0.05 by chance alone." if tests > 1 else ""
        )  # fmt: skip
        return (
            "n seeds; std is the standard deviation over the seeds (n - 1); intervals are those of the mean by "
            "Student's t; p is of a two-sided paired t-test over the seeds that both arms have, and is left out where "
            "they all differ by the same." + several + self._why_no_interval().replace("\n\n", " ")
        )  # fmt: skip

    def _choice(self) -> str:
        """Which point of the grid the validation classes are for, arm by arm."""
        points = dict.fromkeys(child.point for child in self.children)
        if len(points) < 2:
            return ""
        if "validation" not in self.protocols:
            return (
                "No training classes were held out, so nothing here may choose between the points: set "
                "`validation.fraction`, and choose by what is measured there, never by the test set."
            )
        lines = []
        for arm in dict.fromkeys(child.arm for child in self.children):
            labels = {child.label: child.point for child in self.children if child.arm == arm}
            found = [r for r in self.statistics if r["protocol"] == "validation" and r["arm"] in labels]
            if found:
                best = max(found, key=lambda row: row["mean"])
                lines.append([arm, f"`{labels[best['arm']]}`", f"{best['mean']:.4f}", str(best["n"])])
        header = ["arm", "best on the validation classes", f"mean {SELECTION_METRIC} there", "n"]
        return aligned(header, lines, left=2)

    def _reproduce(self) -> str:
        recipes = [
            f"- `{where}`: the recipe `{m.recipe.get('name', 'unknown')}` with the options `{m.recipe.get('options')}`"
            for where, m in self.shards.items()
        ]
        whole, *runs = self.commands
        return "\n".join(
            ["Shards, which `dist-obdsd pack` makes:", "", *recipes, "", "All of it:", "", "```", whole, "```", "",
             "Run by run:", "", "```", *runs, "```"]
        )  # fmt: skip


def make(folder: Path) -> None:
    """
    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error


def _rows_of(outcome: Outcome) -> list[Row]:
    child, summary = outcome.child, outcome.summary
    measured = [(row["protocol"], row["metric"], row["value"], row["epoch"]) for row in summary["rows"]]
    if best := summary["meta"].get("best_validation"):
        measured.append(("validation", SELECTION_METRIC, best["value"], best["epoch"]))
    return [
        {"protocol": protocol, "metric": metric, "value": value, "arm": child.label, "seed": child.seed,
         "epoch": epoch, "run": child.settings.name}
        for protocol, metric, value, epoch in measured
    ]  # fmt: skip


def _figures(of: Spread | None) -> dict[str, Any]:
    """n, mean, std, half and p; None where there are none."""
    p = of.p if isinstance(of, Difference) else None
    if of is None:
        return {"n": None, "mean": None, "std": None, "half": None, "p": None}
    return {"n": of.n, "mean": of.mean, "std": of.std, "half": of.half, "p": p}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(mean: float, half: float | None, form: str) -> str:
    return "-" if half is None else f"{form.format(mean - half)} to {form.format(mean + half)}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table that can be read as it stands; its first ``left`` columns are texts."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        pairs = enumerate(zip(line, widths, strict=True))
        lines.append("| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs) + " |")
    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
