"""Damaged inputs: nothing but our errors, no hang, little memory. ``FUZZ=2000`` tries so many of each."""

import copy
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import decode, examine
from dist_obdsd.data.manifest import Manifest, Shard, to_json
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.data.schedule import plan_epoch
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.errors import UserError
from tests.data.pictures import colours, encoded
from tests.data.pictures import settings as data_settings

NUMBER = int(os.environ.get("FUZZ", "40"))
SECONDS, BYTES = 10, 2**30
fuzz = settings(
    max_examples=NUMBER, deadline=None, derandomize="FUZZ" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
BYTES_OF_NOTE = (b"\0", b"\xff", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"-1", b'"', b",\n")
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("put", "put", "insert", "delete", "cut", "repeat", "flip")),
        st.floats(0, 1),
        st.sampled_from(BYTES_OF_NOTE) | st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, edits: Sequence[tuple[str, float, bytes]]) -> bytes:
    for kind, place, value in edits:
        at = int(place * len(data))
        data = {
            "put": data[:at] + value + data[at + len(value) :],
            "insert": data[:at] + value + data[at:],
            "delete": data[:at] + data[at + 7 * len(value) :],
            "cut": data[:at],
            "repeat": data[:at] + data[max(at - 60, 0) :],
            "flip": data[:at] + bytes(byte ^ 1 << value[0] % 8 for byte in data[at : at + 1]) + data[at + 1 :],
        }[kind]
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


def images() -> dict[str, bytes]:
    rgb, exif = Image.fromarray(colours(40, 60)), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    pages = {"append_images": [rgb.rotate(9)], "save_all": True}
    grey16 = Image.fromarray(colours()[..., 0].astype(np.uint16) * 257)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {"exif": exif, "quality": 90}), (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}), (rgb.convert("RGBA"), "PNG", {}), (grey16, "PNG", {}),
        (rgb, "PNG", {"exif": exif, "icc_profile": b"profile" * 99}), (rgb.quantize(16), "PNG", {"transparency": 3}),
        (rgb, "WEBP", {"exif": exif}), (rgb.convert("RGBA"), "WEBP", {"lossless": True}), (rgb, "WEBP", pages),
        (rgb, "TIFF", {"exif": exif}), (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb, "TIFF", pages),
        (rgb, "TIFF", {"compression": "jpeg"}), (grey16, "TIFF", {}), (rgb.quantize(32), "GIF", {"transparency": 1}),
        (rgb, "GIF", pages), (rgb, "BMP", {}), (rgb.convert("1"), "BMP", {}), (rgb, "PPM", {}), (rgb, "AVIF", {}),
    ]  # fmt: skip
    return {f"{n} {kind}": encoded(image, kind, **options) for n, (image, kind, options) in enumerate(kinds)}


IMAGES = images()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF"])
def test_damaged_images(kind: str) -> None:
    mine = [name for name in IMAGES if name.endswith(kind)]

    @settings(fuzz, max_examples=-(-NUMBER * len(mine) // len(IMAGES)))
    @given(st.sampled_from(mine), EDITS)
    def read(name: str, edits: Sequence[tuple[str, float, bytes]]) -> None:
        data, good = edited(IMAGES[name], edits), False
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
                assert eval_transform(pixels, data_settings(image_size=16)).shape == (channels, 16, 16)

    read()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for n in range(8):
        (folder / f"{n}.png").write_bytes(encoded(Image.new("L", (2, 2), n), "PNG"))
    return folder


def a_manifest() -> dict[str, Any]:
    def shard(split: str, n: int, classes: range) -> Shard:
        labels = tuple(c for c in classes for _ in range(4))
        ids = tuple(range(1000 * n, 1000 * n + len(labels)))
        return Shard(f"{split}-{n}.tar", 9999, "0" * 64, ids, labels, ("both" if n > 5 else "train",) * len(ids))

    splits = {"train": tuple(shard("train", n, range(6)) for n in range(4)), "test": (shard("test", 9, range(6, 9)),)}
    found: dict[str, Any] = json.loads(to_json(Manifest({"name": "x"}, 0, 2, tuple("abcdefghi"), splits)))
    return found


def use_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with watched(), suppress(UserError):
        manifest = manifests.load(folder)
        to_json(manifest).encode()
        sizes = {"global_size": 8, "samples_per_class": 2, "lanes": 2, "window": 2}
        plan_epoch(manifest, manifests.split_classes(manifest, 0)[0], seed=0, epoch=0, **sizes)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


NUMBERS, TEXTS, HOLDERS = (-1, 2**70, 1.5, math.nan, math.inf), ("", "x", "\ud800", "../x", "\0"), ([], {}, [[]], ["7"])
VALUES = (None, True, *NUMBERS, *TEXTS, *HOLDERS)


@fuzz
@given(
    st.lists(st.tuples(st.sampled_from(list(places(a_manifest()))), st.sampled_from(VALUES)), min_size=1, max_size=2)
)
def test_manifests_with_wrong_values(source: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    raw = a_manifest()
    for path, value in changes:
        with suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            holder = raw
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = copy.deepcopy(value)
    use_manifest(source, json.dumps(raw).encode())


@fuzz
@given(EDITS)
def test_damaged_manifests(source: Path, edits: Sequence[tuple[str, float, bytes]]) -> None:
    use_manifest(source, edited(json.dumps(a_manifest()).encode(), edits))


ROWS = [f"{n}.png,class {n // 2},{'test,query' if n > 5 else 'train,'}" for n in range(8)]


@fuzz
@given(EDITS)
def test_damaged_lists(source: Path, edits: Sequence[tuple[str, float, bytes]]) -> None:
    (source / "list.csv").write_bytes(edited("\n".join(["path,class,split,role", *ROWS]).encode(), edits))
    with watched(), suppress(UserError):
        pack(load_recipe("csv"), source / "list.csv", source.parent / "out")
        shutil.rmtree(source.parent / "out")
