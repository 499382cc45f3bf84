"""The figures and the report of a run: their data, and how they are made.

``runs/NAME/figures/`` holds the PNG files and what they are drawn from: ``evaluation.npz`` (a sample of the last
evaluation and some of its queries) and ``batch.npz`` (embeddings of the latest epoch's last batch). So a figure can be
drawn anew without the network.
"""

import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dist_obdsd.config import Config, load_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.shard_reader import cache_of
from dist_obdsd.errors import InputError, format_error
from dist_obdsd.evaluation.retrieval import EvaluationResult, RankedQuery
from dist_obdsd.figures import figures, retrieval_grid
from dist_obdsd.figures.run_report import FIGURES, run_report
from dist_obdsd.files import write_atomically
from dist_obdsd.manifold.diffusion import Diffusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 5
"""Queries in either half of the retrieval grid."""
MOST_IMAGES = 4096
"""Images of the largest batch whose manifold is drawn: one process solves its diffusion."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSample:
    """A global batch as the objective saw it."""

    rows_BD: torch.Tensor
    labels_B: torch.Tensor
    network: str
    """The network that made the rows: teacher or student."""


@dataclass
class RunFigures:
    """Keeps what a run's figures need, and draws them. Failures are only logged."""

    run: Path | None
    """The run folder; None where this rank draws nothing."""

    def keep_batch(self, batch: BatchSample | None, epoch: int) -> None:
        """Keep the latest batch, of an epoch that counts from 0."""
        if batch is not None and len(batch.rows_BD) <= MOST_IMAGES:
            self._keep("batch", {"whose": batch.network, "epoch": epoch + 1}, batch.rows_BD, batch.labels_B)

    def keep_evaluation(self, what: str, result: EvaluationResult, epoch: int, classes: tuple[str, ...]) -> None:
        """Keep an evaluation, if it took a sample. ``classes`` are names, by label."""
        sample = result.sample
        if sample is None:
            return
        queries = {"best": result.successes[:ROWS], "worst": retrieval_grid.wrong_at_first(result.failures)[:ROWS]}
        shown = {label for of in queries.values() for q in of for label in (q.query_label, *q.neighbour_labels)}
        about = {
            "what": what,
            "epoch": epoch,
            "queries": result.queries,
            "singular": sample.singular,
            "answers": {name: [asdict(query) for query in of] for name, of in queries.items()},
            "names": {label: classes[label] for label in sorted(shown | set(sample.labels_m.tolist()))},
        }
        self._keep("evaluation", about, sample.rows_mD, sample.labels_m)

    def _keep(self, name: str, about: Mapping[str, Any], rows_nD: torch.Tensor, labels_n: torch.Tensor) -> None:
        if self.run is None:
            return
        buffer = io.BytesIO()
        rows, labels = rows_nD.detach().float().cpu().numpy(), labels_n.cpu().numpy()
        np.savez(buffer, about=np.array(json.dumps(about)), rows=rows, labels=labels)
        try:
            (self.run / "figures").mkdir(exist_ok=True)
            write_atomically(self.run / "figures" / f"{name}.npz", buffer.getvalue())
        except Exception as error:
            logger.info("nothing is kept for the figures (%s); the run goes on", format_error(error))

    def draw(self) -> list[Path]:
        """Draw the run's figures and write its report; return the files."""
        if self.run is None:
            return []
        started = time.perf_counter()
        paths, failures = draw(self.run)
        for failure in failures:
            logger.info(failure)
        seconds = time.perf_counter() - started
        logger.info("%d figures and report.html in %s (%.1f s)", len(paths) - 1, self.run, seconds)
        return paths


def draw(run: Path, overrides: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Draw the figures of a run folder and write its report.

    Args:
        overrides: settings that replace the run's, such as where the shards are now.

    Returns:
        The files written, the report last, and a sentence for each file that failed.

    Raises:
        InputError: the folder is that of no run.
    """
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"{run} has no metrics.jsonl; give the folder of a run, such as runs/NAME")
    folder = RunFolder(run, load_config(run / "config.yaml", overrides))
    paths, failures = [], []
    for path in (*(run / "figures" / f"{name}.png" for name in FIGURES), run / "report.html"):
        try:
            if path.suffix == ".html":
                write_atomically(path, run_report(run, folder.config, folder.metrics, folder.summary).encode())
            elif (figure := getattr(folder, path.stem)()) is not None:
                path.parent.mkdir(exist_ok=True)
                retrieval_grid.write(path, figure)
            else:
                continue
            paths.append(path)
        except Exception as error:
            failures.append(f"{path} is missing ({format_error(error)}); `dist-obdsd figures {run}` makes it again")
    return paths, failures


class RunFolder:
    """Reads a run folder and draws its figures; None where it has no data."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    def validation_curves(self) -> "Figure | None":
        lines: dict[str, dict[int, float]] = {}
        for row in (row for row in self.metrics if row["kind"] == "validation"):
            for name, value in row.items():
                if name not in ("kind", "step", "epoch") and 0 <= value <= 1:
                    lines.setdefault(name, {})[row["epoch"]] = value
        best = (self.summary.get("meta", {}).get("best_validation") or {}).get("epoch")
        title = f"{self.config.name}: validation on classes that are not trained on"
        return figures.validation_curves(lines, best, title) if lines else None

    def loss_curves(self) -> "Figure | None":
        steps = [row for row in self.metrics if row["kind"] == "step"]
        config, size = self.config, self.config.batch.global_size
        title = f"{config.name}: {config.ranking.name} and {config.distillation.target}, batches of {size} images"
        return figures.loss_curves(steps, title, size, config.optim.head_scale) if steps else None

    def recall_curves(self) -> "Figure | None":
        lines: dict[str, dict[int, float]] = {}
        for row in self.summary["rows"]:
            gallery, _, metric = row["metric"].rpartition("/")
            name, _, k = metric.partition("@")
            if name == "recall":
                after = f" (after epoch {row['epoch']})" if row["epoch"] else ""
                line = row["protocol"] + (gallery and f", {gallery}") + after
                lines.setdefault(line, {})[int(k)] = row["value"]
        return figures.recall_curves(lines, f"{self.config.name}: Recall@k, test") if lines else None

    def retrieval_grid(self) -> "Figure | None":
        if (kept := self._evaluation) is None:
            return None
        about, data = kept.about, self.config.data
        best, worst = ([RankedQuery(**entry) for entry in about["answers"][name]] for name in ("best", "worst"))
        if not (ids := retrieval_grid.shown([*best, *worst])):
            return None
        images = retrieval_grid.read_images(data.shards, manifests.load(data.shards), ids, cache_of(data))
        sections = {
            "Best: all or most neighbours are of the query's class": best,
            "Worst: the first neighbour of the query's class comes latest": worst,
        }
        return retrieval_grid.retrieval_grid(sections, images, kept.names, self._title("nearest neighbours", kept))

    def embedding_map(self) -> "Figure | None":
        if (kept := self._evaluation) is None:
            return None
        title = self._title("embeddings", kept)
        return figures.embedding_map(kept.rows_nD, kept.labels_n, kept.names, title, self.config.seed)

    def spectrum(self) -> "Figure | None":
        if (kept := self._evaluation) is None:
            return None
        return figures.spectrum(kept.about["singular"], self._title("rho-spectrum of all embeddings", kept))

    def batch_manifold(self) -> "Figure | None":
        if (kept := _load(self.path / "figures" / "batch.npz")) is None:
            return None
        target = self.config.distillation
        title = f"{self.config.name}: one batch of {len(kept.rows_nD)} images, target {target.target}\n"
        title += f"the last batch of epoch {kept.about['epoch']} as the {kept.about['whose']} embedded it"
        return figures.batch_manifold(kept.rows_nD, kept.labels_n, Diffusion.of(target), title)

    def _title(self, subject: str, kept: "_Kept") -> str:
        what = "{what}, {queries} queries, after epoch {epoch}".format(**kept.about)
        return f"{self.config.name}: {subject}\n{what}"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, without one that is being written."""
        whole, _, _ = (self.path / "metrics.jsonl").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; without rows while the run goes on."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else {"rows": []}

    @cached_property
    def _evaluation(self) -> "_Kept | None":
        return _load(self.path / "figures" / "evaluation.npz")


class _Kept(NamedTuple):
    """The content of a file that ``RunFigures`` wrote."""

    about: dict[str, Any]
    names: dict[int, str]
    rows_nD: torch.Tensor
    labels_n: torch.Tensor


def _load(path: Path) -> _Kept | None:
    if not path.is_file():
        return None
    with np.load(path) as kept:
        about = json.loads(str(kept["about"]))
        names = {int(label): name for label, name in about.get("names", {}).items()}
        return _Kept(about, names, torch.from_numpy(kept["rows"]), torch.from_numpy(kept["labels"]))
