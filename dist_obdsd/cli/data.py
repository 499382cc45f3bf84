"""``dist-obdsd pack`` and ``verify``."""

import argparse
import time
from pathlib import Path

from dist_obdsd.cli.output import show
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.packing import pack as packing
from dist_obdsd.data.packing import verify as verifying
from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.errors import InputError


def pack(options: argparse.Namespace) -> int:
    """Turn a download or a folder of images into shards."""
    recipe = load_recipe(options.recipe, options.overrides)
    start = time.monotonic()
    manifest = packing.pack(
        recipe, options.source, options.out, seed=options.seed, samples_per_class=options.samples_per_class,
        resize=options.resize, allow_partial=options.allow_partial, overwrite=options.overwrite,
        workers=options.workers,
    )  # fmt: skip
    seconds = time.monotonic() - start
    for split, shards in manifest.splits.items():
        classes = len(manifest.class_ids(split))
        show(f"{split}: {manifest.images(split)} images of {classes} classes in {len(shards)} shards")
    _show_rate(options.out, manifest, seconds)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check shards against their manifest."""
    start = time.monotonic()
    if problems := verifying.verify(options.shards, workers=options.workers):
        raise InputError(f"{options.shards} has {len(problems)} problems; pack the data again")
    seconds = time.monotonic() - start
    manifest = manifests.load(options.shards)
    counts = [len(shard) for shard in manifest.shards()]
    show(f"{options.shards}: {sum(counts)} images in {len(counts)} shards, all as the manifest says")
    _show_rate(options.shards, manifest, seconds)
    return 0


def _show_rate(folder: Path | str, manifest: Manifest, seconds: float) -> None:
    images, size = sum(map(len, manifest.shards())), sum(shard.bytes for shard in manifest.shards())
    show(f"{folder}: {seconds:.1f} s, {images / seconds:,.0f} images/s, {size / seconds / 1e6:.1f} MB/s")
