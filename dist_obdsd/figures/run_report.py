"""The report of a run: one HTML page with results, advice, figures, settings."""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dist_obdsd.config import Config

FIGURES = {
    "loss_curves": "Losses, learning rate and target, step by step",
    "validation_curves": "Validation over the epochs",
    "recall_curves": "Recall@k on the test set",
    "retrieval_grid": "The best and the worst queries, each with its nearest neighbours",
    "embedding_map": "Map of the embeddings (t-SNE): a class should be one cluster, away from the others",
    "spectrum": "Singular values of the embeddings",
    "batch_manifold": "One batch: similarities, and the distillation target before and after the diffusion",
}
"""The figures of a run in the report's order, with their captions."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } .facts { color: #666; margin-top: 0 }
table { border-collapse: collapse } th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td { font-variant-numeric: tabular-nums }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600; margin-bottom: .4rem } img { max-width: 100% }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px } .wide { overflow-x: auto }
p, li { max-width: 62rem }
.wide::-webkit-scrollbar { height: 6px } .wide::-webkit-scrollbar-thumb { background: #bbb }
@media (max-width: 40rem) { th, td { padding: .25rem .3rem; font-size: 11px } }
"""
FLAT, SHARP, WAITING, SATURATED = 0.05, 0.9, 0.2, 0.99
"""Shares that lead to advice: entropy that the target lacks to a uniform one, its mass on the image itself, time that
training waits for data, and the validation's metric."""
FEW = 10  # fewer classes tell epochs hardly apart
QUALITY = 80  # of the pictures, from 0 to 100

Row = Mapping[str, Any]


def run_report(run: Path, config: Config, metrics: Sequence[Row], summary: Row) -> str:
    """Write the report of a run as HTML.

    Args:
        run: the run folder, with ``figures/``.
        metrics: rows of its ``metrics.jsonl``.
        summary: content of its ``summary.json``, or ``{"rows": []}`` while it runs.
    """
    name, rows = escape(config.name), summary["rows"]
    parts = [f'<h1>{name}</h1><p class="facts">{escape(", ".join(_facts(run, config, summary)))}</p>']
    if rows:
        notes = {row["note"]: row["protocol"] for row in reversed(rows) if "note" in row}  # of the first that has it
        parts += ["<h2>Results on the test set</h2>", _table(_by_protocol(rows))]
        parts += [f"<p>{escape(f'{protocol}: {note}')}</p>" for note, protocol in reversed(notes.items())]
    if advice := list(what_to_try(config, metrics, summary)):
        parts += ["<h2>What to try next</h2><ul>", *(f"<li>{escape(text)}</li>" for text in advice), "</ul>"]
    parts += ["<h2>Figures</h2>", *_figures(run)]
    if validations := {f"after epoch {row['epoch']}": row for row in metrics if row["kind"] == "validation"}:
        parts += ["<h2>Validation</h2>", _table(validations)]
    changed = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    parts += [f"<h2>Settings</h2><p>Those that are not the default:</p><pre>{escape(changed)}</pre>"]
    parts += [f"<details><summary>All settings</summary><pre>{escape(config.to_yaml())}</pre></details>"]
    head = f'<head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
    return f"<!DOCTYPE html><html lang=en>{head}<body>{''.join(parts)}</body></html>\n"


def what_to_try(config: Config, metrics: Sequence[Row], summary: Row) -> Iterator[str]:
    """Advise on the next run, from the numbers of this one."""
    steps = [row for row in metrics if row["kind"] == "step"]
    if summary["rows"] and "untrained" not in {row["protocol"] for row in summary["rows"]}:
        yield "Set evaluation.untrained=true to see how much training improves on the network that it starts from."
    epochs = {row["epoch"]: _score(row, config) for row in metrics if row["kind"] == "validation"}
    best, last = max(epochs, key=lambda epoch: epochs[epoch], default=0), max(epochs, default=0)
    classes = summary.get("meta", {}).get("validation_classes", 0)  # 0 while it runs
    if coarse := bool(epochs and classes) and (classes < FEW or epochs[best] > SATURATED):
        yield (
            f"Validation on {classes} classes, {config.evaluation.select_by} {epochs[best]:.4f}, tells epochs hardly "
            f"apart. Hold out more classes (validation.fraction)."
        )
    if not epochs and not config.validation.holds_out:
        yield "Set validation.fraction=0.2 to hold out classes, so that the best epoch is known without the test set."
    elif best != last:
        yield (
            f"Validation was best after epoch {best} of {last}; later epochs did not help. Take the weights "
            f"best_validation, and try fewer epochs or a lower optim.lr."
        )
    elif len(epochs) > 1 and not coarse:
        yield f"Validation was best after the last epoch, {last}. More epochs may improve it further."
    if masked := sum(row.get("masked", 0) > 0 for row in steps):
        yield f"{masked} of {len(steps)} steps were left out, as their loss was not finite. Lower optim.lr."
    yield from _on_target(config, [row for row in steps if row["epoch"] == steps[-1]["epoch"]])
    waits = [row["data_wait_share"] for row in metrics if row["kind"] == "epoch"]
    if waits and waits[-1] > WAITING:
        yield (
            f"Training waited for data in {waits[-1]:.0%} of the last epoch's time. Raise data.workers "
            f"(now {config.data.workers}), or pack smaller images."
        )


def _on_target(config: Config, steps: Sequence[Row]) -> Iterator[str]:
    if config.distillation.target in ("none", "uniform"):
        return
    missing = [row["target_kl_to_uniform"] for row in steps if "target_kl_to_uniform" in row]
    itself = [row["target_self_mass"] for row in steps if "target_self_mass" in row]
    now = f"distillation.temperature (now {config.distillation.temperature:g})"
    if missing and math.fsum(missing) / len(missing) < FLAT * math.log(config.batch.global_size):
        yield f"The distillation target is nearly uniform, so it tells the student almost nothing. Lower {now}."
    if itself and math.fsum(itself) / len(itself) > SHARP:
        yield f"The distillation target is almost only the image itself, so it adds nothing to learn. Raise {now}."


def _facts(run: Path, config: Config, summary: Row) -> list[str]:
    path, meta = run / "provenance.json", summary.get("meta", {})
    made: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    facts = [config.data.shards, f"{meta['epochs']} epochs, {meta['steps']} steps" if meta else "not finished yet"]
    if "hardware" in made:
        facts.append(f"{made['world_size']} x {made['hardware']}")
    if made.get("git_commit", "unknown") != "unknown":
        facts.append(f"commit {made['git_commit'][:10]}")
    return facts


def _by_protocol(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row["protocol"] + (f", after epoch {row['epoch']}" if row["epoch"] else "")
        found.setdefault(name, {})[row["metric"]] = row["value"]
    return found


def _score(values: Row, config: Config) -> float:
    """Return the number that epochs are compared by, averaged over the galleries."""
    found = [value for name, value in values.items() if name.rpartition("/")[2] == config.evaluation.select_by]
    return math.fsum(found) / len(found)


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name not in ("kind", "step", "epoch")))
    cells = [["weights", *names]]
    cells += [[title, *(f"{row[name]:.4f}" if name in row else "" for name in names)] for title, row in rows.items()]
    html = ""
    for tag, line in zip(["th", *["td"] * len(rows)], cells, strict=True):
        html += "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"
    return f'<div class="wide"><table>{html}</table></div>'


def _figures(run: Path) -> Iterator[str]:
    for name, caption in FIGURES.items():
        path = run / "figures" / f"{name}.png"
        if path.is_file():
            small = BytesIO()  # a PNG of many photos has several MB
            with Image.open(path) as picture:
                picture.convert("RGB").save(small, "WEBP", quality=QUALITY)
                width = picture.width * 2 // 3  # sharp on good screens
            data = base64.b64encode(small.getvalue()).decode()
            image = f'<img alt="{name}" width="{width}" src="data:image/webp;base64,{data}">'
            yield f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
