"""Encoded images, made by libraries or by hand, and how they are compared."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from dist_obdsd.config.sections import DataConfig


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG made by hand: ``kind`` is its colour type, ``rows`` the raw big-endian rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")


def tiff16(pixels: np.ndarray) -> bytes:
    """An uncompressed RGB TIFF of 16 bits, made by hand from uint16 [H, W, 3]."""
    height, width, _ = pixels.shape
    data = pixels.astype("<u2").tobytes()
    # Width, height, bits (a pointer), no compression, RGB, strip, samples, rows, bytes.
    entries = [(256, width), (257, height), (258, None), (259, 1), (262, 2), (273, None), (277, 3), (278, height),
               (279, len(data))]  # fmt: skip
    after = 8 + 2 + 12 * len(entries) + 4
    ifd = struct.pack("<H", len(entries))
    for tag, value in entries:
        if tag == 258:
            ifd += struct.pack("<HHII", tag, 3, 3, after)
        else:
            ifd += struct.pack("<HHII", tag, 4, 1, after + 6 if value is None else value)
    return b"II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0) + struct.pack("<HHH", 16, 16, 16) + data


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
