"""Damaged inputs: nothing but our errors, no hang, little memory. ``FUZZ=2000`` tries so many of each."""

import copy
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import decode, examine
from dist_obdsd.data.manifest import Manifest, Shard, to_json
from dist_obdsd.data.schedule import plan_epoch
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.errors import UserError
from tests.data.pictures import colours, encoded, settings

NUMBER = int(os.environ.get("FUZZ", "40"))
SECONDS, BYTES = 10, 2**30
BYTES_OF_NOTE = (b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"-1", b'"', b",\n")


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(None if "FUZZ" in os.environ else 0)


def damaged(data: bytes, draw: np.random.Generator) -> bytes:
    """Change up to three places."""
    for _ in range(draw.integers(1, 4)):
        at, some = int(draw.integers(len(data) + 1)), BYTES_OF_NOTE[draw.integers(len(BYTES_OF_NOTE))]
        data = (
            data[:at] + some + data[at + len(some) :], data[:at] + some + data[at:], data[:at] + data[at + 9 :],
            data[:at], data[:at] + data[max(at - 60, 0) :],
            data[:at] + bytes(byte ^ 1 << draw.integers(8) for byte in data[at : at + 1]) + data[at + 1 :],
        )[draw.integers(6)]  # fmt: skip
    return data


@contextmanager
def watched() -> Iterator[None]:
    """Fail what takes too long or too much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {SECONDS} seconds"))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


RGB = Image.fromarray(colours(40, 60))
GREY16 = Image.fromarray(colours()[..., 0].astype(np.uint16) * 257)
EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0})
PAGES = {"append_images": [RGB.rotate(9)], "save_all": True}
KINDS: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
    "JPEG": [(RGB, {"exif": EXIF, "quality": 90}), (RGB, {"progressive": True}), (RGB.convert("CMYK"), {})],
    "PNG": [
        *((RGB.convert("RGBA"), {}), (GREY16, {}), (RGB.quantize(16), {"transparency": 3})),
        (RGB, {"exif": EXIF, "icc_profile": b"profile" * 99}),
    ],
    "WEBP": [(RGB, {"exif": EXIF}), (RGB.convert("RGBA"), {"lossless": True}), (RGB, PAGES)],
    "TIFF": [(RGB, {"exif": EXIF}), (RGB, {"compression": "tiff_lzw"}), (RGB, {"compression": "jpeg"}), (GREY16, {})],
    "GIF": [(RGB.quantize(32), {"transparency": 1}), (RGB, PAGES)],
    "BMP": [(RGB, {}), (RGB.convert("1"), {})],
    "PPM": [(RGB, {})],
    "AVIF": [(RGB, {})],
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images(kind: str, draw: np.random.Generator) -> None:
    wholes = [encoded(image, kind, **options) for image, options in KINDS[kind]]
    for n in range(NUMBER // 8 * len(wholes)):
        data, good = damaged(wholes[n % len(wholes)], draw), False
        with watched():
            with suppress(ValueError):
                _, smaller = examine(data, 16)
                good = True
                assert smaller is None or decode(smaller, 3).dtype == torch.uint8
            for channels in (1, 3):
                try:
                    pixels = decode(data, channels)
                except ValueError:
                    assert not good  # the check does what training does
                    continue
                assert eval_transform(pixels, settings(image_size=16)).shape == (channels, 16, 16)


def a_manifest() -> dict[str, Any]:
    def shard(split: str, n: int, classes: range) -> Shard:
        labels = tuple(c for c in classes for _ in range(4))
        ids = tuple(range(1000 * n, 1000 * n + len(labels)))
        return Shard(f"{split}-{n}.tar", 9999, "0" * 64, ids, labels, ("both" if n > 5 else "train",) * len(ids))

    splits = {"train": tuple(shard("train", n, range(6)) for n in range(4)), "test": (shard("test", 9, range(6, 9)),)}
    found: dict[str, Any] = json.loads(to_json(Manifest({"name": "x"}, 0, 2, tuple("abcdefghi"), splits)))
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


VALUES = (None, True, -1, 2**70, 1.5, math.nan, math.inf, "", "x", "\ud800", "../x", "\0", [], {}, [[]], ["7"])


@pytest.mark.parametrize("change", ["a wrong value", "damage"])
def test_damaged_manifests(tmp_path: Path, draw: np.random.Generator, change: str) -> None:
    paths = list(places(a_manifest()))
    for _ in range(2 * NUMBER):
        raw = a_manifest()
        if change == "a wrong value":
            *above, last = paths[draw.integers(len(paths))]
            holder = raw
            for key in above:
                holder = holder[key]
            holder[last] = copy.deepcopy(VALUES[draw.integers(len(VALUES))])
        data = json.dumps(raw).encode()
        (tmp_path / "manifest.json").write_bytes(damaged(data, draw) if change == "damage" else data)
        with watched(), suppress(UserError):
            manifest = manifests.load(tmp_path)
            to_json(manifest).encode()
            sizes = {"global_size": 8, "samples_per_class": 2, "lanes": 2, "window": 2}
            plan_epoch(manifest, manifests.split_classes(manifest, 0)[0], seed=0, epoch=0, **sizes)
