"""``dist-obdsd evaluate`` and ``embed``."""

import argparse
import csv
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from dist_obdsd import checkpoint
from dist_obdsd.cli.output import check_writable, show, table, write_json
from dist_obdsd.cli.ranks import joined
from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.console import NOTICE
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.image_folder import find_images, folder_batches
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.shard_reader import cache_of, image_names
from dist_obdsd.data.stream import evaluation_batches
from dist_obdsd.distributed.collectives import assert_equal_across_ranks, gather_json, met_by_all
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import embedding_files, faiss_index
from dist_obdsd.evaluation.embedding_files import Table
from dist_obdsd.evaluation.evaluator import measure
from dist_obdsd.evaluation.retrieval import EvaluationResult
from dist_obdsd.figures import retrieval_grid
from dist_obdsd.files import write_atomically
from dist_obdsd.inference import build_network, inference_config
from dist_obdsd.models.embedder import Embedder
from dist_obdsd.training.evaluation import embed_all, evaluate_split, settings_from

logger = logging.getLogger(__name__)

# ---- evaluate -------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    """Measure a checkpoint on shards, or embeddings from a file."""
    if options.embeddings is not None and "=" in str(options.checkpoint or ""):  # a setting in the checkpoint's place
        options.overrides.insert(0, str(options.checkpoint))
        options.checkpoint = None
    if (options.checkpoint is None) == (options.embeddings is None):
        raise InputError("evaluate measures a CHECKPOINT or --embeddings FILE; give one of the two")
    if options.shards is None and (options.checkpoint is not None or options.failures is not None):
        purpose = "to embed" if options.checkpoint is not None else "for the picture of --failures"
        raise InputError(f"give the shards that hold the images {purpose} with --shards")
    check_writable(options.json, options.per_class, options.failures)
    if options.embeddings is None:
        _evaluate_checkpoint(options)
    else:
        _evaluate_embeddings(options)
    return 0


def _evaluate_checkpoint(options: argparse.Namespace) -> None:
    with _started(options, options.shards) as (network, config, rank):
        manifest = load_split(options.shards, options.split)
        result = evaluate_split(network, manifest, options.split, config, rank)
        row = {"protocol": "checkpoint", "split": options.split}
        meta = {"checkpoint": str(options.checkpoint), "manifest": manifest.digest}
        _report(options, result, rank, row, meta, manifest, {})


def _evaluate_embeddings(options: argparse.Namespace) -> None:
    # A Config must name a run and its shards; evaluation reads neither.
    bare = {"name": "embeddings", "epochs": 2, "data": {"shards": "none"}}
    with joined(lambda: parse_config(override_config(bare, options.overrides), "the command line")) as (config, rank):
        with raise_on_all_ranks("reading the shards"):
            manifest = None if options.shards is None else manifests.load(options.shards)
        found = embedding_files.read(options.embeddings)
        result = measure(
            found.rows_nD, found.ids_n, found.labels_n, found.roles, settings_from(config), normalize=True,
            device=rank.device,
        )  # fmt: skip
        meta = {"embeddings": str(options.embeddings)}
        _report(options, result, rank, {"protocol": "embeddings"}, meta, manifest, found.class_names)


def _report(
    options: argparse.Namespace, result: EvaluationResult, rank: Runtime, row: dict[str, Any], meta: dict[str, Any],
    manifest: Manifest | None, class_names: Mapping[int, str],
) -> None:  # fmt: skip
    """Print the metrics and write the files asked for. Collective."""
    rows = [{**row, "metric": name, "value": value} for name, value in result.metrics.items()]
    show(table(rows))
    show(f"{result.queries} queries, gallery of {result.gallery}, {result.excluded} without a match left out")
    if manifest is not None:
        class_names = dict(enumerate(manifest.classes)) | dict(class_names)
    with raise_on_all_ranks("writing the results"):
        if not rank.is_main:
            return
        if options.json is not None:
            write_json(options.json, meta | {"queries": result.queries}, rows)
        if options.per_class is not None:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerow(["gallery", "label", "class", "queries", "recall@1"])
            for (gallery, label), (queries, recall) in result.per_class.items():
                lines.writerow([gallery, label, class_names.get(label, ""), queries, recall])
            write_atomically(options.per_class, text.getvalue().encode())
        failures = retrieval_grid.wrong_at_first(result.failures)
        if options.failures is not None and manifest is not None and failures:
            images = retrieval_grid.read_images(options.shards, manifest, retrieval_grid.shown(failures))
            sections = {f"The {len(failures)} worst queries and their nearest neighbours": failures}
            grid = retrieval_grid.retrieval_grid(sections, images, class_names, f"{result.queries} queries")
            retrieval_grid.write(options.failures, grid)
        elif options.failures is not None:
            show(f"{options.failures} is not written: every query's nearest neighbour is of its class")


# ---- embed ----------------------------------------------------------------------------------------------------------


def embed(options: argparse.Namespace) -> int:
    """Write the embeddings of shards or of a folder of images to a file."""
    if (options.shards is None) == (options.images is None):
        raise InputError("embed takes its images from --shards DIR or --images DIR; give one of the two")
    if options.skip_broken and options.images is None:
        raise InputError("--skip-broken is for --images; shards hold no broken image, since pack leaves them out")
    _check_embed_outputs(options)
    with _started(options, options.shards or str(options.images)) as (network, config, rank):
        broken: dict[int, str] | None = {} if options.skip_broken else None
        if options.shards is not None:
            manifest = load_split(options.shards, options.split)
            with raise_on_all_ranks("looking up the images' names"):
                columns = _columns_of_split(manifest, options, config, rank.is_main)
                batches = evaluation_batches(manifest, options.split, config, rank.rank, rank.world_size)
        else:
            with raise_on_all_ranks("looking for images"):
                folder = find_images(options.images)
            digest = hashlib.sha256("\0".join(folder.paths).encode()).hexdigest()
            assert_equal_across_ranks("the folder of images", digest, InputError)
            columns = _columns_of_paths(folder.paths, folder.classes)
            batches = folder_batches(folder, config, rank.rank, rank.world_size, broken)
        with raise_on_all_ranks("embedding the images"):
            rows_nD, ids_n, _, _ = embed_all(network, batches, rank.device)
        if broken is not None:
            columns = _without_broken(columns, broken)
        if options.out is not None:
            embedding_files.write(options.out, rows_nD, ids_n, columns, options.dtype)
        if options.index is not None:
            faiss_index.write(options.index, rows_nD, ids_n, columns)
        for path in filter(None, (options.out, options.index)):
            show(f"{path}: {len(columns['ids'])} embeddings of {config.model.embedding_dim} numbers")
    return 0


def _check_embed_outputs(options: argparse.Namespace) -> None:
    if options.out is None and options.index is None:
        raise InputError("embed writes --out FILE, --index FILE or both; give one of them")
    if options.out is not None:
        embedding_files.check_suffix(options.out)
    if options.index is not None:
        faiss_index.check_faiss()
        written = [path.absolute() for path in (options.index, faiss_index.keys_path(options.index))]
        if options.out is not None and options.out.absolute() in written:
            raise InputError(f"--out and --index both write {options.out}; give them different names")
    check_writable(options.out, options.index)


def _without_broken(columns: Table, broken: dict[int, str]) -> Table:
    """Name the images that any rank left out, and drop them. Collective."""
    reasons = {int(image_id): reason for found in gather_json(broken) for image_id, reason in found.items()}
    for image_id in sorted(reasons):
        logger.log(NOTICE, "left out %s: it cannot be %s", columns["keys"][image_id], reasons[image_id])
    if len(reasons) == len(columns["ids"]):
        raise met_by_all(InputError(f"none of the {len(reasons)} images can be read; the reasons stand above"))
    keep = ~np.isin(columns["ids"], list(reasons))
    return {name: column[keep] for name, column in columns.items()}


def _columns_of_split(manifest: Manifest, options: argparse.Namespace, config: Config, is_main: bool) -> Table:
    shards = manifest.splits[options.split]
    images = sorted(image for shard in shards for image in zip(shard.ids, shard.classes, shard.roles, strict=True))
    ids, labels, roles = zip(*images, strict=True)
    # The main rank writes.
    names = image_names(options.shards, shards, cache=cache_of(config.data)) if is_main else {}
    return {
        "ids": np.array(ids, dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "classes": np.array([manifest.classes[label] for label in labels]),
        "roles": np.array(roles),
        "keys": np.array([names.get(image_id, manifests.key(image_id)) for image_id in ids]),
    }


def _columns_of_paths(paths: list[str], classes: list[str]) -> Table:
    columns = {"ids": np.arange(len(paths), dtype=np.int64), "keys": np.array(paths)}
    if classes:
        columns["labels"] = np.unique(classes, return_inverse=True)[1].astype(np.int64)
        columns["classes"] = np.array(classes)
    return columns


# ---- both -----------------------------------------------------------------------------------------------------------


@contextmanager
def _started(options: argparse.Namespace, shards: str) -> Iterator[tuple[Embedder, Config, Runtime]]:
    """Join the ranks, each with the checkpoint's network."""
    state: dict[str, Any] = {}

    def read() -> Config:
        state.update(checkpoint.load(options.checkpoint))
        return inference_config(state, options.overrides, shards)

    with joined(read) as (config, rank):
        with raise_on_all_ranks("reading the checkpoint"):
            network = build_network(state, config, rank.device, options.checkpoint, options.overrides)
        yield network, config, rank


def load_split(shards: str, split: str) -> Manifest:
    """Read a manifest that must have a split. Collective."""
    with raise_on_all_ranks("reading the shards"):
        manifest = manifests.load(shards)
        if split not in manifest.splits:
            raise InputError(f"{shards} has no split {split}; it has {', '.join(manifest.splits)}")
    return manifest
