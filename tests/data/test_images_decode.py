"""Every kind of image that users have, to pixels."""

import base64
import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.data import images
from dist_obdsd.data.images import decode, examine
from tests.data.pictures import assert_close, colours, encoded, noise, png, tiff16


def test_one_bit_palette_and_grey() -> None:
    bits = (np.arange(105 * 105).reshape(105, 105) % 3 == 0).astype(np.uint8) * 255
    data = encoded(Image.fromarray(bits).convert("1"), "PNG")
    assert_close(decode(data, 1), bits)
    assert_close(decode(data, 3), np.repeat(bits[:, :, None], 3, axis=2))
    palette = Image.fromarray(colours()).quantize(64)
    assert_close(decode(encoded(palette, "PNG"), 3), np.asarray(palette.convert("RGB")))
    assert_close(decode(encoded(palette, "GIF"), 3), np.asarray(palette.convert("RGB")))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, :2, 3], rgba[:, 2:4, 3], rgba[:, 4:, 3] = 255, 51, 0  # opaque, a fifth, invisible
    wanted = np.full((4, 6, 3), 255, dtype=np.uint8)
    wanted[:, :2] = [200, 0, 0]
    wanted[:, 2:4] = [244, 204, 204]
    assert_close(decode(encoded(Image.fromarray(rgba), "PNG"), 3), wanted, 1)
    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert_close(decode(encoded(grey_alpha, "PNG"), 1)[:, :, 4:], np.full((4, 2), 255))
    transparent = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode="P")
    transparent.putpalette([10, 20, 30, 40, 50, 60])
    assert_close(
        decode(encoded(transparent, "PNG", transparency=0), 3),
        np.array([[[255] * 3, [40, 50, 60]], [[40, 50, 60], [255] * 3]]),
    )
    key_colour = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    assert_close(decode(encoded(key_colour, "PNG", transparency=(1, 2, 3)), 3), np.array([[[255] * 3, [9] * 3]]))


def test_cmyk() -> None:
    cmyk = Image.fromarray(colours()).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data  # so its numbers are inverted in the file
    assert_close(decode(data, 3), colours(), 8)
    inks = np.zeros((2, 4, 4), dtype=np.uint8)
    inks[:, 0], inks[:, 1], inks[:, 2] = [0, 255, 255, 0], [255, 0, 0, 0], [0, 0, 0, 102]
    wanted = np.array([[[255, 0, 0], [0, 255, 255], [153] * 3, [255] * 3]] * 2)  # no ink is white
    assert_close(decode(encoded(Image.fromarray(inks, mode="CMYK"), "TIFF"), 3), wanted)
    assert_close(decode(encoded(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=100, subsampling=0), 3), wanted, 6)


# What a file's rows and columns show, by the EXIF orientation that undoes it; [H, W, 3] in upright position.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[:, ::-1].swapaxes(0, 1),  # its first row is the right-hand side
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[::-1].swapaxes(0, 1),  # its first row is the left-hand side, from below
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    shown = STORED[orientation](colours())
    stored = Image.fromarray(np.ascontiguousarray(shown))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        assert_close(decode(encoded(stored, kind, exif=exif, lossless=True), 3), colours())
    jpeg = encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0)
    assert_close(decode(jpeg, 3), colours(), 6)
    assert_close(decode(jpeg, 1), np.asarray(Image.fromarray(colours()).convert("L")), 6)
    assert_close(decode(jpeg, 3, exif=False), shown, 6)
    assert_close(decode(encoded(stored, "PNG", exif=exif), 3, exif=False), shown)
    assert_close(decode(encoded(stored, "PNG"), 3), shown)  # the control: unmarked


def test_an_orientation_in_xmp_counts_too() -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](colours())))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert_close(decode(encoded(stored, "JPEG", xmp=xmp, quality=100, subsampling=0), 3), colours(), 6)


def test_sixteen_bits_of_every_kind_keep_the_upper_eight() -> None:
    eight = colours(4, 6).astype(np.uint16)
    wide = (eight << 8) + 200  # rounding would give one more
    assert_close(decode(png(6, 4, 16, 2, wide.astype(">u2").tobytes()), 3), eight)
    assert_close(decode(tiff16(wide), 3), eight)
    grey = Image.fromarray(wide[..., 0])
    assert_close(decode(encoded(grey, "TIFF"), 3), np.repeat(eight[..., :1], 3, axis=2))
    assert_close(decode(encoded(grey, "PNG"), 3), np.repeat(eight[..., :1], 3, axis=2))
    opaque = np.concatenate([wide, np.full((4, 6, 1), 65535, np.uint16)], axis=2)
    assert_close(decode(png(6, 4, 16, 6, opaque.astype(">u2").tobytes()), 3), eight)
    opaque[:, :3, 3] = 0
    wanted = eight.copy()
    wanted[:, :3] = 255
    assert_close(decode(png(6, 4, 16, 6, opaque.astype(">u2").tobytes()), 3), wanted)
    half_visible = np.stack([wide[..., 0], opaque[..., 3]], axis=2)
    assert_close(decode(png(6, 4, 16, 4, half_visible.astype(">u2").tobytes()), 1), wanted[..., 0])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert_close(decode(data, 3), np.tile(np.array([255, 0, 0]), (4, 5, 1)), 3)


JPEGS: dict[str, dict[str, object]] = {
    "baseline": {}, "progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1},
    "restarts": {"restart_marker_blocks": 2}, "RGB": {"keep_rgb": True},
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_has_pillows_pixels(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    for pixels in (noise, noise[:1, :1], noise[:3, :17], noise[..., 0]):
        if name == "RGB" and pixels.ndim == 2:
            continue
        data = encoded(Image.fromarray(pixels), "JPEG", **JPEGS[name])
        assert_close(decode(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert_close(decode(data, 1), np.asarray(Image.open(io.BytesIO(data)).convert("L")))


def test_pillow_decodes_what_torchcodec_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, mode: str) -> torch.Tensor:
        raise RuntimeError("no such colours")

    plain = encoded(Image.fromarray(colours()), "JPEG", quality=100, subsampling=0)
    for decoder in (refuse, None):  # None: as where TorchCodec is not installed
        monkeypatch.setattr(images, "_decode_jpeg", decoder)
        assert_close(decode(plain, 3), colours(), 6)


HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAA"
    "AERAAAEAAQAAAAABoQABAAAAAAAAALAAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADd"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAA"
    "AwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xh"
    "cAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAALhtZGF0AAAA"
    "rCgBrwngITip/+44//ywdl7eip5Wnv1j//viy+0o//d8bdH6PCaMPyT+8ZO9/1V7rZGTZUf/ninTDrjn3XjOi6670B4lQ8e/Aj15WSaLPgZom/ld"
    "/uUZB3KqHYYbeb12OWQwr9hRy15Lb/e//IgnMOIKmfKbcM8dqW5Nd2MFGIYr3ukTqqyMShekK2ywpU3bMXrGHmXdnuDVWSQpmdKjaw/VpANmkzVz"
    "xrzpwfk="
)
"""64 x 48 pixels, made with libheif: red above on the left, blue below on the right."""


@pytest.mark.parametrize("kind", ["HEIC", "AVIF"])
def test_photos_of_phones(kind: str) -> None:
    if kind == "HEIC":
        data = base64.b64decode(HEIC)
        try:
            pytest.importorskip("torchcodec").decoders.decode_heic(data)
        except RuntimeError:
            pytest.skip("libheif is not installed")
    else:
        square = np.zeros((48, 64, 3), np.uint8)
        square[:24, :32], square[24:, 32:] = (220, 40, 30), (30, 60, 210)
        data = encoded(Image.fromarray(square), "AVIF", quality=90)
    pixels_CHW = decode(data, 3)
    assert pixels_CHW.shape == (3, 48, 64)
    for (row, column), colour in {(10, 10): (220, 40, 30), (40, 50): (30, 60, 210)}.items():
        assert (pixels_CHW[:, row, column].int() - torch.tensor(colour)).abs().max() <= 4
    suffix, smaller = images.examine(data, resize=24)
    assert suffix == "jpg"
    assert smaller is not None
    assert decode(smaller, 3).shape == (3, 24, 32)
    assert images.examine(data) == (kind.lower(), None)


def test_damage_that_pillow_passes_over_gives_the_same_pixels() -> None:
    data, same = noise(1, "JPEG", (64, 64)), 0
    for place in np.random.default_rng(2).integers(700, len(data) - 2, 40).tolist():
        broken = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            wanted = np.asarray(Image.open(io.BytesIO(broken)).convert("RGB"))
        except OSError:
            with pytest.raises(ValueError, match="."):
                decode(broken, 3)
            continue
        assert_close(decode(broken, 3), wanted)
        same += 1
    assert same > 20


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    for width, height in ((10_000, 9_000), (30_000, 30_000)):  # Pillow itself warns of the first and refuses the second
        bomb = png(width, height, 1, 0, bytes(8 * height))  # rows too short, which decoding would find
        assert len(bomb) < 2**16
        for read in (examine, partial(decode, channels=3)):
            with pytest.raises(ValueError, match=r"10000 x 9000 pixels|900000000 pixels"):
                read(bomb)
