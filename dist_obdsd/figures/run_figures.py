"""The figures of a run: what is kept for them, and how they are drawn from it.

``runs/NAME/figures/`` holds the PNG files and what they are drawn from: ``evaluation.npz`` (a sample of the last
evaluation and some of its queries) and ``batch.npz`` (embeddings of the latest epoch's last batch). So a figure can be
drawn anew without the network.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
        """Draw the run's figures; return the files."""
        if self.run is None:
            return []
        paths, failures = draw(self.run)
        for failure in failures:
            logger.info(failure)
        logger.info("%d figures in %s", len(paths), self.run / "figures")
        return paths


def draw(run: Path, overrides: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Draw the figures of a run folder for which something was kept.

    Args:
        overrides: settings that replace the run's, such as where the shards are now.

    Returns:
        The files written, and a sentence for each that failed.

    Raises:
        InputError: the folder is that of no run.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} has no config.yaml; give the folder of a run, such as runs/NAME")
    config = load_config(run / "config.yaml", overrides)
    paths, failures = [], []
    for source, figures_of in SOURCES.items():
        if (kept := _load(run / "figures" / source)) is None:
            continue
        for name, figure in figures_of.items():
            path = run / "figures" / f"{name}.png"
            try:
                retrieval_grid.write(path, figure(config, kept))
                paths.append(path)
            except Exception as error:
                failures.append(f"{path} is missing ({format_error(error)}); `dist-obdsd figures {run}` makes it again")
    return paths, failures


class _Kept(NamedTuple):
    """The content of a file that ``RunFigures`` wrote."""

    about: dict[str, Any]
    rows_nD: torch.Tensor
    labels_n: torch.Tensor

    @property
    def names(self) -> dict[int, str]:
        """Class names by label, which JSON made text."""
        return {int(label): name for label, name in self.about["names"].items()}


def _load(path: Path) -> _Kept | None:
    if not path.is_file():
        return None
    with np.load(path) as kept:
        about = json.loads(str(kept["about"]))
        return _Kept(about, torch.from_numpy(kept["rows"]), torch.from_numpy(kept["labels"]))


def _title(config: Config, subject: str, kept: _Kept) -> str:
    return f"{config.name}: {subject}\n" + "{what}, {queries} queries, after epoch {epoch}".format(**kept.about)


def _retrieval_grid(config: Config, kept: _Kept) -> "Figure":
    best, worst = ([RankedQuery(**entry) for entry in kept.about["answers"][name]] for name in ("best", "worst"))
    sections = {
        "Best: all or most neighbours are of the query's class": best,
        "Worst: the first neighbour of the query's class comes latest": worst,
    }
    data, ids = config.data, retrieval_grid.shown([*best, *worst])
    images = retrieval_grid.read_images(data.shards, manifests.load(data.shards), ids, cache_of(data))
    return retrieval_grid.retrieval_grid(sections, images, kept.names, _title(config, "nearest neighbours", kept))


def _embedding_map(config: Config, kept: _Kept) -> "Figure":
    title = _title(config, "embeddings", kept)
    return figures.embedding_map(kept.rows_nD, kept.labels_n, kept.names, title, config.seed)


def _spectrum(config: Config, kept: _Kept) -> "Figure":
    return figures.spectrum(kept.about["singular"], _title(config, "rho-spectrum of all embeddings", kept))


def _batch_manifold(config: Config, kept: _Kept) -> "Figure":
    target = config.distillation
    title = f"{config.name}: one batch of {len(kept.rows_nD)} images, target {target.target}\n"
    title += f"the last batch of epoch {kept.about['epoch']} as the {kept.about['whose']} embedded it"
    return figures.batch_manifold(kept.rows_nD, kept.labels_n, Diffusion.of(target), title)


SOURCES = {
    "evaluation.npz": {
        "retrieval_grid": _retrieval_grid, "embedding_map": _embedding_map, "spectrum": _spectrum,
    },
    "batch.npz": {"batch_manifold": _batch_manifold},
}  # fmt: skip
"""What was kept -> the figures that are drawn from it."""
