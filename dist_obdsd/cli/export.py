"""``dist-obdsd export``."""

import argparse
from typing import Any

from dist_obdsd import export as exporting
from dist_obdsd.cli.evaluate import load_split
from dist_obdsd.cli.output import show
from dist_obdsd.data.image_folder import find_images
from dist_obdsd.data.packing.readers.glyphs import draw_letters
from dist_obdsd.errors import InputError
from dist_obdsd.figures.retrieval_grid import read_images


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint's network as files that other programs run."""
    if options.shards is not None and options.images is not None:
        raise InputError("export is verified on --shards DIR or on --images DIR; give one of the two, or none")
    formats = list(dict.fromkeys(options.format.split(",")))
    images, source = _images_to_verify(options)
    largest = exporting.export(options.checkpoint, options.out, formats, images, source)
    for name, difference in largest.items():
        file = options.out / exporting.FILES[name]
        show(f"{file}: differs from the checkpoint by at most {difference:.1e} ({len(images)} images from {source})")
    return 0


def _images_to_verify(options: argparse.Namespace) -> tuple[list[Any], str]:
    count = exporting.IMAGES
    if options.images is not None:
        folder = find_images(options.images)
        every = -(-len(folder.files) // count)  # from all over the folder
        return [file.path for file in folder.files[::every]], str(options.images)
    if options.shards is not None:
        manifest = load_split(options.shards, options.split)
        ids = [image_id for shard in manifest.splits[options.split] for image_id in shard.ids][:count]
        found = read_images(options.shards, manifest, ids)
        return [found[image_id][0] for image_id in ids], options.shards
    return draw_letters(count), "drawn letters"
