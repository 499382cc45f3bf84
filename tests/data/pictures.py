"""Encoded images, made by libraries or by hand, and how they are compared."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from dist_obdsd.config.sections import DataConfig


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(seed: int, kind: str = "PNG", size: tuple[int, int] = (12, 10), **options: object) -> bytes:
    """An encoded image that no other seed gives; ``size`` is its width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(pixels, kind, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    """One of the parts that a PNG consists of."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG made by hand: ``kind`` is its colour type, ``rows`` the raw big-endian rows."""
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, data: bytes, tags: dict[int, int], order: str = "<") -> bytes:
    """A grey uncompressed TIFF made by hand.

    Args:
        tags: bits of a pixel (258) and, unless black is 0, the kind of colours (262).
    """
    entries = {256: width, 257: height, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data)} | tags
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4  # the pixels' place, behind all entries
    ifd = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    begin = b"II*\0" if order == "<" else b"MM\0*"
    return begin + struct.pack(f"{order}IH", 8, len(entries)) + ifd + bytes(4) + data


def colours(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth image, so that lossy formats stay close to it: red grows to the right, green downwards, blue is 40."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], axis=2).astype(np.uint8)


def settings(**changes: object) -> DataConfig:
    return DataConfig.model_validate({"shards": "x", "image_size": 16, "mean": (0.5,), "std": (0.5,)} | changes)


def assert_close(found: torch.Tensor, wanted: np.ndarray, within: int = 0) -> None:
    wanted = wanted[None] if wanted.ndim == 2 else wanted.transpose(2, 0, 1)
    assert found.dtype == torch.uint8
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy().astype(int) - wanted.astype(int)).max() <= within
