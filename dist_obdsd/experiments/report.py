"""Report of a comparison: its numbers as Markdown, CSV, JSON and a figure."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_obdsd.data.manifest import Manifest
from dist_obdsd.errors import InputError
from dist_obdsd.experiments import plot
from dist_obdsd.experiments.run_metadata import run_metadata
from dist_obdsd.experiments.run_status import FINISHED, RunStatus
from dist_obdsd.experiments.statistics import FEWEST, Spread, difference, spread
from dist_obdsd.files import write_atomically

PROTOCOLS = {
    "best_validation": "the best epoch on classes held out of training, measured once on the test set",
    "last": "after the last epoch, measured once on the test set; nothing was chosen",
    "validation": "the held-out training classes at their best epoch: to choose settings by, not to report",
    "best_test": "as in the papers: the epoch was chosen on the test set, which flatters the result",
    "untrained": "before the first step, on the test set",
}
HEADLINES = ("recall@1", "map@r")
"""The metrics on the terminal and in the figure, where they were measured."""

Row = dict[str, Any]


class Report:
    """The numbers of the finished runs, and the names of the others."""

    def __init__(
        self, name: str, commands: Sequence[str], runs: Sequence[RunStatus], baseline: str,
        shards: Mapping[str, Manifest],
    ) -> None:  # fmt: skip
        """
        Args:
            commands: the command line that makes the whole comparison, and one for each run.
            baseline: the variant that every other one is compared with, at the same point of the grid.
            shards: manifests by ``data.shards``.
        """
        self.name, self.commands, self.baseline, self.shards = name, commands, baseline, shards
        self.missing = [run for run in runs if run.state != FINISHED]
        self.finished = [run for run in runs if run.state == FINISHED]
        self.conditions = run_metadata(self.finished, shards)
        self.specs = [run.spec for run in runs]
        self.labels = _unique(spec.label for spec in self.specs)
        self.baselines = {
            spec.label: f"{baseline} {spec.point}".strip() for spec in self.specs if spec.variant != baseline
        }
        self.rows = [row for run in self.finished for row in _rows_of(run)]
        self.values: dict[tuple[str, str, str], dict[int, float]] = {}
        """(protocol, metric, variant's label) -> value by seed."""
        for row in self.rows:
            self.values.setdefault((row["protocol"], row["metric"], row["variant"]), {})[row["seed"]] = row["value"]
        keys = itertools.product(PROTOCOLS, _unique(row["metric"] for row in self.rows), self.labels)
        self.statistics = [self._statistic(*key) for key in keys if key in self.values]
        self.protocols = _unique(row["protocol"] for row in self.statistics)

    def _statistic(self, protocol: str, metric: str, label: str) -> Row:
        values, other = self.values[protocol, metric, label], self.baselines.get(label)
        against = difference(values, self.values.get((protocol, metric, other), {})) if other is not None else None
        row = {"protocol": protocol, "metric": metric, "variant": label} | asdict(spread(list(values.values())))
        row |= {f"difference_{name}": getattr(against, name, None) for name in Spread.__dataclass_fields__}
        return row | {"baseline": other}

    def headline_metrics(self) -> list[str]:
        """Return Recall@1 and MAP@R of the first gallery, else the first two metrics."""
        metrics = _unique(row["metric"] for row in self.statistics if row["protocol"] == self.protocols[0])
        return [name for name in metrics if name.rpartition("/")[2] in HEADLINES][:2] or metrics[:2]

    def means(self) -> dict[str, float]:
        """Return mean and standard deviation per variant and metric, for a tracker."""
        found: dict[str, float] = {}
        for row in self.statistics:
            name = f"{row['variant'].replace('=', '_')}/{row['protocol']}/{row['metric']}"
            found |= {f"{name}/{k}": row[k] for k in ("mean", "std") if row[k] is not None}
        return found

    def meta(self) -> dict[str, Any]:
        """Return what stands beside the rows in a JSON file."""
        return {
            "name": self.name, "command": self.commands[0], "baseline": self.baseline,
            "runs": len(self.specs), "finished": len(self.finished),
            "missing": [{"run": r.spec.config.name, "state": r.state, "message": r.message} for r in self.missing],
            "run_metadata": self.conditions, "statistics": self.statistics,
        }  # fmt: skip

    def write(self, folder: Path) -> list[Path]:
        """Write report.md, report.png, values.csv and statistics.csv into a folder."""
        make_folder(folder)
        files = {"values.csv": _csv(self.rows).encode(), "statistics.csv": _csv(self.statistics).encode()}
        if self.protocols:
            protocol = self.protocols[0]
            panels = {
                metric: {label: self.values.get((protocol, metric, label), {}) for label in self.labels}
                for metric in self.headline_metrics()
            }
            files["report.png"] = plot.draw(f"{self.name} ({protocol})", panels, self.baselines)
        files["report.md"] = self.markdown().encode()
        for name, data in files.items():
            write_atomically(folder / name, data)
        return [folder / name for name in files]

    def headline(self) -> str:
        """Format the first protocol's most telling metrics as a table."""
        if not self.protocols:
            return "the runs measured nothing; set evaluation.test=true or hold out validation classes"
        return self._table(self.protocols[0], self.headline_metrics())

    def markdown(self) -> str:
        parts = [
            f"# {self.name}: a comparison of {', '.join(_unique(spec.variant for spec in self.specs))}",
            f"{len(self.finished)} of {len(self.specs)} runs are finished. Differences are to the baseline "
            f"`{self.baseline}`, seed by seed.",
        ]
        if self.missing:
            missing = [f"- `{r.spec.config.name}` {r.state}: {r.message or 'no message'}" for r in self.missing]
            parts.append("**These runs are missing from the numbers below:**\n\n" + "\n".join(missing))
        parts.append("## Results")
        if self.protocols:
            parts.append("![Every seed, the means and their 95 % intervals](report.png)")
        for protocol in self.protocols:
            parts.append(f"### {protocol}\n\n{PROTOCOLS[protocol].capitalize()}.")
            parts.append(self._table(protocol))
        parts.append(self._legend())
        if choice := self._choice():
            parts.append(f"## Choice of the grid's point\n\n{choice}")
        conditions = [[name, value.replace("|", "\\|")] for name, value in self.conditions.items()]
        settings = {spec.label: " ".join(f"`{override}`" for override in spec.changes) for spec in self.specs}
        parts += [
            f"## Conditions\n\n{aligned(['', ''], conditions)}",
            f"## Settings of the variants\n\n{aligned(['variant', 'settings'], list(settings.items()))}",
            f"## To reproduce it\n\n{self._reproduce()}",
        ]
        return "\n\n".join(parts) + "\n"

    def _table(self, protocol: str, metrics: Sequence[str] | None = None) -> str:
        """Format means, and differences to the baseline, of all metrics or of some."""
        header = ["metric", "variant", "n", "mean", "std", "95 % interval", "difference", "95 % interval", "pairs", "p"]
        rows = [row for row in self.statistics if row["protocol"] == protocol]
        rows = [row for row in rows if metrics is None or row["metric"] in metrics]
        lines = []
        for row in rows:
            std, mean, p = row["std"], row["difference_mean"], row["difference_p"]
            cells = [row["metric"], row["variant"], str(row["n"]), f"{row['mean']:.4f}"]
            cells += ["-" if std is None else f"{std:.4f}", _interval(row["mean"], row["half"], ".4f")]
            if mean is None:
                cells += ["baseline" if row["baseline"] is None else "-", "", "", ""]
            else:
                cells += [f"{mean:+.4f}", _interval(mean, row["difference_half"], "+.4f"), str(row["difference_n"])]
                cells.append("-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}")
            lines.append(cells)
        few = any(row["n"] < FEWEST for row in rows)
        note = f"\n\nA variant with fewer than {FEWEST} finished seeds has no interval and no p-value." if few else ""
        return aligned(header, lines) + note

    def _legend(self) -> str:
        tests = sum(row["difference_p"] is not None for row in self.statistics)
        return (
            "n seeds; std is the standard deviation over the seeds (n - 1); intervals are those of the mean by "
            "Student's t; p is of a two-sided paired t-test over the seeds that both variants have, and is left out "
            f"where they all differ by the same. The tables hold {tests} tests, uncorrected: of 20 without any "
            f"effect, about one is below 0.05 by chance."
        )

    def _choice(self) -> str:
        """Name the grid's point that is best on the validation classes, for each variant."""
        if len({spec.point for spec in self.specs}) < 2:
            return ""
        if "validation" not in self.protocols:
            return (
                "No training classes were held out, so nothing here may choose between the points: set "
                "`validation.fraction`, and choose by what is measured there, never by the test set."
            )
        lines, metric = [], self.specs[0].config.evaluation.select_by
        for variant in _unique(spec.variant for spec in self.specs):
            points = {spec.label: spec.point for spec in self.specs if spec.variant == variant}
            found = [r for r in self.statistics if r["protocol"] == "validation" and r["variant"] in points]
            if found:
                best = max(found, key=lambda row: row["mean"])
                lines.append([variant, f"`{points[best['variant']]}`", f"{best['mean']:.4f}", str(best["n"])])
        return aligned(["variant", "best on the validation classes", f"mean {metric} there", "n"], lines)

    def _reproduce(self) -> str:
        recipes = [
            f"- `{root}`: the recipe `{m.recipe.get('name', 'unknown')}` with the options `{m.recipe.get('options')}`"
            for root, m in self.shards.items()
        ]
        whole, *runs = self.commands
        lines = ["Shards, which `dist-obdsd pack` makes:", "", *recipes, "", "```", whole, "```"]
        return "\n".join([*lines, "", "Or run by run:", "", "```", *runs, "```"])


def make_folder(folder: Path) -> None:
    """Make the folder of a report; InputError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error


def _rows_of(run: RunStatus) -> list[Row]:
    spec, summary = run.spec, run.summary
    measured = [(row["protocol"], row["metric"], row["value"], row["epoch"]) for row in summary["rows"]]
    if best := summary["meta"].get("best_validation"):
        measured.append(("validation", spec.config.evaluation.select_by, best["value"], best["epoch"]))
    return [
        {"protocol": protocol, "metric": metric, "value": value, "variant": spec.label, "seed": spec.seed,
         "epoch": epoch, "run": spec.config.name}
        for protocol, metric, value, epoch in measured
    ]  # fmt: skip


def _interval(mean: float, half: float | None, form: str) -> str:
    return "-" if half is None else f"{mean - half:{form}} to {mean + half:{form}}"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned Markdown table, whose first two columns are texts."""
    widths = [max(2, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    rule = ["-" * (width - (i > 1)) + ":" * (i > 1) for i, width in enumerate(widths)]
    lines = [
        [cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _unique(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
