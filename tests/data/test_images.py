"""Images as people have them, to pixels: every kind, odd bits, damaged or large metadata."""

import io
import resource
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_obdsd.data import images
from dist_obdsd.data.images import FORMATS, decode, examine
from tests.data.pictures import assert_close, chunk, colours, encoded, noise, png, tiff
from tests.data.shards import examples

READS: list[Callable[[bytes], object]] = [examine, partial(decode, channels=3)]


def test_one_bit_palette_and_grey() -> None:
    bits = (np.arange(105 * 105).reshape(105, 105) % 3 == 0).astype(np.uint8) * 255
    data = encoded(Image.fromarray(bits).convert("1"), "PNG")
    assert_close(decode(data, 1), bits)
    assert_close(decode(data, 3), np.dstack([bits] * 3))
    palette = Image.fromarray(colours()).quantize(64)
    for kind in ("PNG", "GIF"):
        assert_close(decode(encoded(palette, kind), 3), np.asarray(palette.convert("RGB")))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, :2, 3], rgba[:, 2:4, 3], rgba[:, 4:, 3] = 255, 51, 0  # opaque, a fifth, invisible
    wanted = np.full((4, 6, 3), 255, dtype=np.uint8)
    wanted[:, :2] = [200, 0, 0]
    wanted[:, 2:4] = [244, 204, 204]
    assert_close(decode(encoded(rgba, "PNG"), 3), wanted, 1)
    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert_close(decode(encoded(grey_alpha, "PNG"), 1)[:, :, 4:], np.full((4, 2), 255))
    transparent = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode="P")
    transparent.putpalette([10, 20, 30, 40, 50, 60])
    assert_close(
        decode(encoded(transparent, "PNG", transparency=0), 3),
        np.array([[[255] * 3, [40, 50, 60]], [[40, 50, 60], [255] * 3]]),
    )
    key_colour = np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)
    assert_close(decode(encoded(key_colour, "PNG", transparency=(1, 2, 3)), 3), np.array([[[255] * 3, [9] * 3]]))


def test_cmyk() -> None:
    data = encoded(Image.fromarray(colours()).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data  # so its numbers are inverted in the file
    assert_close(decode(data, 3), colours(), 8)
    inks = np.zeros((2, 4, 4), dtype=np.uint8)
    inks[:, 0], inks[:, 1], inks[:, 2] = [0, 255, 255, 0], [255, 0, 0, 0], [0, 0, 0, 102]
    wanted = np.array([[[255, 0, 0], [0, 255, 255], [153] * 3, [255] * 3]] * 2)  # no ink is white
    cmyk = Image.fromarray(inks, mode="CMYK")
    assert_close(decode(encoded(cmyk, "TIFF"), 3), wanted)
    assert_close(decode(encoded(cmyk, "JPEG", quality=100, subsampling=0), 3), wanted, 6)


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
    stored, exif = np.ascontiguousarray(STORED[orientation](colours())), Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        assert_close(decode(encoded(stored, kind, exif=exif, lossless=True), 3), colours())
    jpeg = encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0)
    assert_close(decode(jpeg, 3), colours(), 6)
    assert_close(decode(jpeg, 1), np.asarray(Image.fromarray(colours()).convert("L")), 6)
    assert_close(decode(jpeg, 3, exif=False), stored, 6)
    assert_close(decode(encoded(stored, "PNG", exif=exif), 3, exif=False), stored)
    assert_close(decode(encoded(stored, "PNG"), 3), stored)  # the control: unmarked


def test_an_orientation_in_xmp_counts_too() -> None:
    stored = np.ascontiguousarray(STORED[6](colours()))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert_close(decode(encoded(stored, "JPEG", xmp=xmp, quality=100, subsampling=0), 3), colours(), 6)


def test_sixteen_bits_of_colour_keep_the_upper_eight() -> None:
    eight = colours(4, 6).astype(np.uint16)
    wide = (eight << 8) + 200  # rounding would give one more
    assert_close(decode(png(6, 4, 16, 2, wide.astype(">u2").tobytes()), 3), eight)
    for kind in ("TIFF", "PNG"):
        assert_close(decode(encoded(wide[..., 0], kind), 3), np.dstack([eight[..., 0]] * 3))
    alpha, wanted = np.full((4, 6, 1), 65535, np.uint16), eight.copy()
    alpha[:, :3], wanted[:, :3] = 0, 255
    rgba, grey_alpha = (np.concatenate([x, alpha], axis=2).astype(">u2").tobytes() for x in (wide, wide[..., :1]))
    assert_close(decode(png(6, 4, 16, 6, rgba), 3), wanted)
    assert_close(decode(png(6, 4, 16, 4, grey_alpha), 1), wanted[..., 0])


def test_other_bits_of_grey_keep_the_upper_eight() -> None:
    ramp = np.arange(240, dtype=np.uint16).reshape(12, 20)
    packed = bytes(
        byte
        for low, high in (ramp.reshape(-1, 2) * 16 + 9).tolist()
        for byte in (low >> 4, (low & 15) << 4 | high >> 8, high & 255)
    )
    assert_close(decode(tiff(20, 12, packed, {258: 12}), 1), ramp)
    for order in ("<", ">"):
        assert_close(decode(tiff(20, 12, (ramp * 256 + 77).astype(f"{order}u2").tobytes(), {258: 16}, order), 1), ramp)
    white_is_0 = tiff(20, 12, (ramp * 256 + 77).astype("<u2").tobytes(), {258: 16, 262: 0})
    assert_close(decode(white_is_0, 1), 255 - ramp)
    pgm = b"P5 20 12 65535\n" + (ramp * 257).astype(">u2").tobytes()
    assert_close(decode(pgm, 1), ramp)


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
    noisy = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    for pixels in (noisy, noisy[:1, :1], noisy[:3, :17], *([] if name == "RGB" else [noisy[..., 0]])):
        data = encoded(pixels, "JPEG", **JPEGS[name])
        for channels, mode in ((3, "RGB"), (1, "L")):
            assert_close(decode(data, channels), np.asarray(Image.open(io.BytesIO(data)).convert(mode)))


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


def test_pillow_decodes_what_torchcodec_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, mode: str) -> torch.Tensor:
        raise RuntimeError("no such colours")

    plain = encoded(colours(), "JPEG", quality=100, subsampling=0)
    for decoder in (refuse, None):  # None: as where TorchCodec is not installed
        monkeypatch.setattr(images, "_decode_jpeg", decoder)
        assert_close(decode(plain, 3), colours(), 6)


@pytest.mark.parametrize("kind", ["HEIC", "AVIF"])
def test_photos_of_phones(kind: str) -> None:
    square = np.zeros((48, 64, 3), np.uint8)
    square[:24, :32], square[24:, 32:] = (220, 40, 30), (30, 60, 210)
    data = encoded(square, "AVIF", quality=90)
    if kind == "HEIC":
        data = Path(__file__).with_name("phone.heic").read_bytes()  # of the same square, made with libheif
        try:
            pytest.importorskip("torchcodec").decoders.decode_heic(data)
        except RuntimeError:
            pytest.skip("libheif is not installed")
    pixels_CHW = decode(data, 3)
    assert pixels_CHW.shape == (3, 48, 64)
    for row, column in ((10, 10), (40, 50)):
        assert (pixels_CHW[:, row, column].int() - torch.tensor(square[row, column]).int()).abs().max() <= 4
    suffix, smaller = examine(data, resize=24)
    assert suffix == "jpg"
    assert decode(smaller or b"", 3).shape == (3, 24, 32)
    assert examine(data) == (kind.lower(), None)


@pytest.mark.parametrize("read", READS)
def test_what_is_no_image_to_train_on_is_refused(read: Callable[[bytes], object]) -> None:
    for data in (b"no image at all", b"", encoded(colours(60, 60), "EPS")):  # EPS would call another program
        with pytest.raises(ValueError, match="its format is none of AVIF, BMP, GIF, JPEG"):
            read(data)
    with pytest.raises(ValueError, match="(?i)truncated"):
        read(encoded(colours(60, 60), "JPEG")[:700])
    for width, height in ((10_000, 9_000), (30_000, 30_000)):  # Pillow itself warns of the first and refuses the second
        bomb = png(width, height, 1, 0, bytes(8 * height))  # rows too short, which decoding would find
        assert len(bomb) < 2**16
        with pytest.raises(ValueError, match=r"10000 x 9000 pixels|900000000 pixels"):
            read(bomb)


NUMBERS = np.arange(-12, 12).reshape(4, 6)
UNKNOWN_RANGE = {
    "32-bit integers": encoded(NUMBERS.astype(np.int32), "TIFF"),
    "floats": encoded(NUMBERS.astype(np.float32), "TIFF"),
    "floats as PFM": encoded(NUMBERS.astype(np.float32), "PPM"),
    "signed 8": tiff(6, 4, NUMBERS.astype("<i1").tobytes(), {258: 8, 339: 2}),
    "signed 16": tiff(6, 4, NUMBERS.astype("<i2").tobytes(), {258: 16, 339: 2}),
}


@pytest.mark.parametrize("name", UNKNOWN_RANGE)
def test_pixels_of_unknown_range_are_refused(name: str) -> None:
    kind = "floating-point numbers" if "float" in name else "signed or 32-bit integers"
    for read in (*READS, partial(decode, channels=1)):
        with pytest.raises(ValueError, match=f"its pixels are {kind}, of which nobody knows the range"):
            read(UNKNOWN_RANGE[name])


def written(mode: str) -> list[bytes]:
    """A small image in every format that has the mode; most lack most modes."""
    found = []
    for kind in FORMATS:
        with suppress(OSError, KeyError, ValueError, SystemError):
            found.append(encoded(Image.new(mode, (8, 6)), kind))
    return found


WRITTEN = {
    mode: written(mode) for mode in ("RGB", "LAB", "YCbCr", "CMYK", "RGBX", "I;16", "LA", "PA", "RGBA", "P", "1")
}


@pytest.mark.parametrize("mode", WRITTEN)
def test_what_passes_the_check_can_be_decoded(mode: str) -> None:
    assert WRITTEN[mode]
    for data in WRITTEN[mode]:
        assert examine(data)[1] is None
        assert [decode(data, channels).shape for channels in (1, 3)] == [(1, 6, 8), (3, 6, 8)]
        assert decode(examine(data, 3)[1] or b"", 3).shape == (3, 3, 4)


@st.composite
def damaged(draw: st.DrawFn, mode: str) -> bytes:
    """An image in which up to three places are overwritten, cut out or added to."""
    data = draw(st.sampled_from(WRITTEN[mode]))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=9)) + data[at + draw(st.sampled_from([0, 1, 4, 9, 60, 2**20])) :]
    return data


@pytest.mark.parametrize("mode", WRITTEN)
@examples(12)
@given(st.data())
def test_damage_is_a_value_error_and_costs_little(mode: str, data: st.DataObject) -> None:
    image, good, before = data.draw(damaged(mode)), False, resource.getrusage(resource.RUSAGE_SELF)
    with suppress(ValueError):
        _, smaller = examine(image, 16)
        good = True
        assert smaller is None or decode(smaller, 3).dtype == torch.uint8
    for channels in (1, 3):
        try:
            assert decode(image, channels).shape[0] == channels
        except ValueError:
            assert not good  # the check does what training does
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 10  # seconds
    assert after.ru_maxrss - before.ru_maxrss < 2**20  # KiB


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of the orientation 6 (turned) and (tag, type, count, value or offset) entries."""
    rows = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    ifd = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in sorted(rows))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows)) + ifd + bytes(4)


FAR = struct.pack("<I", 2**31)
EXIF_DAMAGES = {  # and the shape that is decoded: where no orientation is left, the image stays as it is
    "a value beyond the end": (exif_of((0x010F, 2, 400, FAR)), (30, 20)),
    "a resolution that is a text": (exif_of((0x011A, 2, 4, b"300\0"), (0x0128, 7, 4, b"\xff\xfe\0\1")), (30, 20)),
    "an unknown type": (exif_of((0x9C9B, 99, 7, FAR)), (30, 20)),
    "a sub-block that is itself": (exif_of((0x8769, 4, 1, struct.pack("<I", 8))), (30, 20)),
    "four billion values": (exif_of((0x9286, 7, 2**32 - 1, FAR)), (30, 20)),
    "nonsense": (b"Exif\0\0nonsense", (20, 30)),
    "cut": (exif_of()[:20], (20, 30)),
    "an orientation that is a text": (exif_of((0x0112, 2, 2, b"6\0\0\0")), (20, 30)),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", EXIF_DAMAGES)
def test_damaged_exif_costs_nothing(kind: str, damage: str) -> None:
    exif, shape = EXIF_DAMAGES[damage]
    data = encoded(colours(), kind, exif=exif)
    assert examine(data)[1] is None
    shapes = {tuple(decode(data, channels).shape[1:]) for channels in (1, 3)}
    shapes.add(Image.open(io.BytesIO(examine(data, 10)[1] or b"")).size[::-1])
    assert shapes == {shape, (shape[0] // 2, shape[1] // 2)}


LARGE = bytes(6 * 2**20)
METADATA = (
    {  # large enough to pass Pillow's limits, or cut
        "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)) * 2,
        "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)) * 2,
        "iCCP": chunk(b"iCCP", b"colours\0\0" + zlib.compress(LARGE)) * 2,
        "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * len(LARGE)) * 12,
        "a wrong sum": chunk(b"eXIf", exif_of()[6:-1] + b"\1")[:-1] + b"?",
    }
    | {f"cut {name}": chunk(name.encode(), b"") for name in ("pHYs", "gAMA", "sRGB", "cHRM", "acTL", "eXIf", "tEXt")}
)


@pytest.mark.parametrize("name", METADATA)
def test_odd_metadata_of_a_png_cost_nothing(name: str) -> None:
    places = (33,) if name == "a wrong sum" else (33, -12)  # after the header; before the end, where no sum counts
    transparent = Image.fromarray(colours()).convert("RGBA")
    transparent.putalpha(0)
    for image, wanted in ((colours(), colours()), (transparent.quantize(4), colours() * 0 + 255)):
        plain = encoded(image, "PNG")
        for at in places:
            data = plain[:at] + METADATA[name] + plain[at:]
            assert_close(decode(data, 3), wanted)
            assert examine(data) == ("png", None)
        broken = bytearray(data)
        broken[data.index(b"IDAT") + 10] ^= 1
        with pytest.raises(ValueError, match="."):  # other damage still counts
            examine(bytes(broken))
