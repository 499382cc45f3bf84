"""``dist-obdsd pack`` and ``verify``."""

import argparse
import time

from dist_obdsd import console
from dist_obdsd.cli.output import show
from dist_obdsd.data import manifest as manifests
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
    images, size = sum(map(len, manifest.shards())), sum(shard.bytes for shard in manifest.shards())
    show(f"{options.out}: {console.rate(images, size, seconds)}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check shards against their manifest."""
    start = time.monotonic()
    if problems := verifying.verify(options.shards, workers=options.workers):
        raise InputError(f"{options.shards} has {len(problems)} problems; pack the data again")
    seconds = time.monotonic() - start
    manifest = manifests.load(options.shards)
    shards = list(manifest.shards())
    images, size = sum(map(len, shards)), sum(shard.bytes for shard in shards)
    show(f"{options.shards}: {images} images in {len(shards)} shards, all as the manifest says")
    show(f"{options.shards}: {console.rate(images, size, seconds)}")
    return 0
