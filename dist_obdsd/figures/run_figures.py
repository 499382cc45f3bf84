"""The figures of a run folder: what is kept for them while the run goes on, and drawing them from it.

``runs/NAME/figures/`` holds the PNG files and what they are drawn from, beside ``config.yaml``, ``metrics.jsonl`` and
``summary.json``: ``evaluation.npz`` (a sample of the last measurement and some of its answers) and ``batch.npz``
(the embeddings of the last batch of the latest epoch). So a figure can be drawn anew without the network.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_obdsd.config import Config, load_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.shard_reader import cache_of
from dist_obdsd.errors import InputError, format_error
from dist_obdsd.evaluation.evaluator import EvaluationResult
from dist_obdsd.evaluation.retrieval import RankedQuery
from dist_obdsd.figures import figures
from dist_obdsd.figures import retrieval_grid as pictures
from dist_obdsd.files import write_atomically
from dist_obdsd.manifold.diffusion import Diffusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 5
"""Queries in either half of the retrieval grid."""
MOST_IMAGES = 4096
"""In a batch whose manifold is drawn: its diffusion is solved by the one process that draws."""


@dataclass(frozen=True)
class Seen:
    """A global batch as the objective saw it."""

    rows_BD: torch.Tensor
    labels_B: torch.Tensor
    whose: str
    """Who made the rows: teacher or student."""


class Album:
    """Keeps what the figures need and draws them. Whatever fails is told, and never ends a run."""

    def __init__(self, run: Path | None, say: Callable[[str], None]) -> None:
        """
        Args:
            run: the run folder; None where this rank draws nothing.
        """
        self.run, self.say = run, say

    def keep_batch(self, seen: Seen | None, epoch: int) -> None:
        """Keep the latest batch.

        Args:
            epoch: that it belongs to, from 0.
        """
        if self.run is not None and seen is not None and len(seen.rows_BD) <= MOST_IMAGES:
            about = {"whose": seen.whose, "epoch": epoch + 1}
            rows_BD, labels_B = seen.rows_BD.detach().float().cpu(), seen.labels_B.cpu()
            self._keep("batch", about, rows=rows_BD.numpy(), labels=labels_B.numpy())

    def keep_evaluation(self, what: str, result: EvaluationResult, epoch: int, classes: tuple[str, ...]) -> None:
        """Keep a measurement, if a sample was taken.

        Args:
            classes: names, by label.
        """
        if self.run is None or result.sample is None:
            return
        sample = result.sample
        answers = {"best": result.successes[:ROWS], "worst": pictures.wrong_at_first(result.failures)[:ROWS]}
        shown = {label for of in answers.values() for a in of for label in (a.query_label, *a.neighbour_labels)}
        about = {
            "what": what,
            "epoch": epoch,
            "queries": result.queries,
            "singular": sample.singular,
            "answers": {name: [asdict(answer) for answer in of] for name, of in answers.items()},
            "names": {label: classes[label] for label in sorted(shown | set(sample.labels_m.tolist()))},
        }
        self._keep("evaluation", about, rows=sample.rows_mD.float().numpy(), labels=sample.labels_m.numpy())

    def _keep(self, name: str, about: Mapping[str, Any], **arrays: np.ndarray) -> None:
        assert self.run is not None
        buffer = io.BytesIO()
        np.savez(buffer, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
        try:
            (self.run / "figures").mkdir(exist_ok=True)
            write_atomically(self.run / "figures" / f"{name}.npz", buffer.getvalue())
        except Exception as error:
            self.say(f"nothing is kept for the figures ({format_error(error)}); the run goes on")

    def draw(self) -> list[Path]:
        """Draw all figures that there is something for.

        Returns:
            The files written.
        """
        if self.run is None:
            return []
        started = time.perf_counter()
        paths = list(draw(self.run, self.say))
        self.say(f"{len(paths)} figures in {self.run / 'figures'} ({time.perf_counter() - started:.1f} s)")
        return paths


def draw(run: Path, say: Callable[[str], None], overrides: Sequence[str] = ()) -> Iterator[Path]:
    """Draw the figures of a run folder and give the files as they are written.

    Args:
        say: is told why a figure is left out.
        overrides: settings that replace the run's, such as where the shards are now.

    Raises:
        InputError: the folder is that of no run, once the first figure is asked for.
    """
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"{run} has no metrics.jsonl; give the folder of a run, such as runs/NAME")
    pages = _Pages(run, load_config(run / "config.yaml", overrides))
    for name in ("loss_curves", "recall_curves", "retrieval_grid", "embedding_map", "spectrum", "batch_manifold"):
        try:
            (run / "figures").mkdir(exist_ok=True)
            path = run / "figures" / f"{name}.png"
            figure = getattr(pages, name)()
            if figure is not None:
                pictures.write(path, figure)
                yield path
        except Exception as error:
            say(f"{run / 'figures'}: no {name}.png ({format_error(error)}); `dist-obdsd figures {run}` draws it again")


class _Pages:
    """One method per figure; None where the run has nothing to show."""

    def __init__(self, run: Path, config: Config) -> None:
        self.run, self.config = run, config

    def loss_curves(self) -> "Figure | None":
        steps = [row for row in self._metrics if row["kind"] == "step"]
        config = self.config
        title = f"{config.name}: {config.ranking.name} and {config.distillation.target}, batches of "
        title += f"{config.batch.global_size} images"
        return figures.loss_curves(steps, title, config.batch.global_size) if steps else None

    def recall_curves(self) -> "Figure | None":
        lines: dict[str, dict[int, float]] = {}
        summary = self.run / "summary.json"
        rows = json.loads(summary.read_text())["rows"] if summary.is_file() else []
        for row in rows:
            gallery, _, metric = row["metric"].rpartition("/")
            name, _, k = metric.partition("@")
            if name == "recall":
                after = f" (after epoch {row['epoch']})" if row["epoch"] else ""
                line = row["protocol"] + (gallery and f", {gallery}") + after
                lines.setdefault(line, {})[int(k)] = row["value"]
        return figures.recall_curves(lines, f"{self.config.name}: Recall@k, test") if lines else None

    def retrieval_grid(self) -> "Figure | None":
        if self._evaluation is None:
            return None
        _, about = self._evaluation
        answers = {name: [_answer(entry) for entry in of] for name, of in about["answers"].items()}
        shards = self.config.data.shards
        ids = pictures.shown(answer for of in answers.values() for answer in of)
        if not ids:
            return None
        images = pictures.read_images(shards, manifests.load(shards), ids, cache_of(self.config.data))
        sections = {
            "Best: all or most of the nearest are of the query's class": answers["best"],
            "Worst: its class comes latest": answers["worst"],
        }
        return pictures.retrieval_grid(sections, images, _names(about), self._title("nearest neighbours"))

    def embedding_map(self) -> "Figure | None":
        if self._evaluation is None:
            return None
        arrays, about = self._evaluation
        rows_mD, labels_m = arrays["rows"], arrays["labels"]
        return figures.embedding_map(rows_mD, labels_m, _names(about), self._title("embeddings"), self.config.seed)

    def spectrum(self) -> "Figure | None":
        if self._evaluation is None:
            return None
        return figures.spectrum(self._evaluation[1]["singular"], self._title("rho-spectrum of all embeddings"))

    def batch_manifold(self) -> "Figure | None":
        batch = _load(self.run / "figures" / "batch.npz")
        if batch is None:
            return None
        arrays, about = batch
        target = self.config.distillation
        title = f"{self.config.name}: one batch of {len(arrays['rows'])} images, target {target.target}\n"
        title += f"the last batch of epoch {about['epoch']} as the {about['whose']} embedded it"
        return figures.batch_manifold(arrays["rows"], arrays["labels"], Diffusion.of(target), title)

    def _title(self, what: str) -> str:
        assert self._evaluation is not None
        about = self._evaluation[1]
        measured = f"{about['what']}, {about['queries']} queries, after epoch {about['epoch']}"
        return f"{self.config.name}: {what}\n{measured}"

    @cached_property
    def _metrics(self) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:  # a line that is being written
                continue
        return rows

    @cached_property
    def _evaluation(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return _load(self.run / "figures" / "evaluation.npz")


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What ``Album._keep`` wrote, if it did: (arrays, the rest)."""
    if not path.is_file():
        return None
    with np.load(path) as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "about"}
        return arrays, json.loads(str(archive["about"]))


def _answer(entry: Mapping[str, Any]) -> RankedQuery:
    fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in entry.items()}
    return RankedQuery(**fields)


def _names(about: Mapping[str, Any]) -> dict[int, str]:
    return {int(label): name for label, name in about["names"].items()}
