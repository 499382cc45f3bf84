"""Images as people have them: damaged or large metadata, odd bits, odd shapes."""

import io
import math
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.data import transforms
from dist_obdsd.data.images import FORMATS, decode, examine
from dist_obdsd.data.transforms import eval_transform
from tests.data.pictures import assert_close, chunk, colours, encoded, settings, tiff


@pytest.mark.parametrize("read", [examine, partial(decode, channels=3)])
def test_image_formats_that_nobody_reads_are_refused(read: Callable[[bytes], object]) -> None:
    photo = Image.fromarray(colours(60, 60))
    for data in (b"no image at all", b"", encoded(photo, "EPS")):  # EPS would call another program
        with pytest.raises(ValueError, match="its format is none of AVIF, BMP, GIF, JPEG"):
            read(data)
    with pytest.raises(ValueError, match="(?i)truncated"):
        read(encoded(photo, "JPEG")[:700])


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of the orientation 6 (turned) and (tag, type, count, value or offset) entries."""
    rows = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    ifd = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in sorted(rows))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows)) + ifd + bytes(4)


FAR = struct.pack("<I", 2**31)
TAG_DAMAGES = {
    "a value beyond the end": exif_of((0x010F, 2, 400, FAR)),
    "a resolution that is a text": exif_of((0x011A, 2, 4, b"300\0"), (0x0128, 7, 4, b"\xff\xfe\0\1")),
    "an unknown type": exif_of((0x9C9B, 99, 7, FAR)),
    "a sub-block that is itself": exif_of((0x8769, 4, 1, struct.pack("<I", 8))),
    "four billion values": exif_of((0x9286, 7, 2**32 - 1, FAR)),
}
BLOCK_DAMAGES = {  # which leave no orientation
    "nonsense": b"Exif\0\0nonsense",
    "cut": exif_of()[:20],
    "an orientation that is a text": exif_of((0x0112, 2, 2, b"6\0\0\0")),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", [*TAG_DAMAGES, *BLOCK_DAMAGES])
def test_damaged_exif_costs_nothing(kind: str, damage: str) -> None:
    data = encoded(Image.fromarray(colours()), kind, exif=(TAG_DAMAGES | BLOCK_DAMAGES)[damage])
    assert examine(data)[1] is None
    if damage in TAG_DAMAGES:  # the orientation counts all the same
        assert [tuple(decode(data, channels).shape) for channels in (1, 3)] == [(1, 30, 20), (3, 30, 20)]
        assert Image.open(io.BytesIO(examine(data, 10)[1] or b"")).size == (10, 15)
    else:
        assert decode(data, 3).shape[0] == 3


LARGE = bytes(6 * 2**20)
METADATA = {  # large enough to pass Pillow's limits, or cut
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)) * 2,
    "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)) * 2,
    "iCCP": chunk(b"iCCP", b"colours\0\0" + zlib.compress(LARGE)) * 2,
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * len(LARGE)) * 12,
} | {f"cut {name}": chunk(name.encode(), b"") for name in ("pHYs", "gAMA", "sRGB", "cHRM", "acTL", "eXIf", "tEXt")}


@pytest.mark.parametrize("name", [*METADATA, "a wrong sum"])
def test_odd_metadata_of_a_png_cost_nothing(name: str) -> None:
    wrong = chunk(b"eXIf", exif_of()[6:-1] + b"\1")[:-1] + b"?"
    part = METADATA.get(name, wrong)
    # After the header, before the end, where Pillow does not look at the sum.
    places = (33, -12) if name in METADATA else (33,)
    transparent = Image.fromarray(colours()).convert("RGBA")
    transparent.putalpha(0)
    for image, wanted in ((Image.fromarray(colours()), colours()), (transparent.quantize(4), colours() * 0 + 255)):
        plain = encoded(image, "PNG")
        for at in places:
            data = plain[:at] + part + plain[at:]
            assert_close(decode(data, 3), wanted)
            assert examine(data) == ("png", None)
        broken = bytearray(data)
        broken[data.index(b"IDAT") + 10] ^= 1
        with pytest.raises(ValueError, match="."):  # other damage still counts
            examine(bytes(broken))


WIDE = {
    "32-bit integers": Image.fromarray(np.arange(-9, 15, dtype=np.int32).reshape(4, 6) * 2**24),
    "or 32-bit": Image.fromarray(np.arange(24, dtype=np.int32).reshape(4, 6) * 10),
    "floating-point": Image.fromarray(np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)),
}


@pytest.mark.parametrize("name", [*WIDE, "signed 8", "signed 16"])
def test_pixels_of_unknown_range_are_refused(name: str) -> None:
    signed = 8 if name.endswith("8") else 16
    data = (
        encoded(WIDE[name], "TIFF") if name in WIDE
        else tiff(6, 4, np.arange(-12, 12).astype(f"<i{signed // 8}").tobytes(), {258: signed, 339: 2})
    )  # fmt: skip
    for read in (examine, partial(decode, channels=1), partial(decode, channels=3)):
        with pytest.raises(ValueError, match=name.split(" 8")[0].split(" 16")[0]):
            read(data)


def test_other_bits_than_eight_keep_the_upper_eight() -> None:
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


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "CMYK", "RGBX", "I;16", "LA", "PA", "1", "I", "F"])
def test_what_passes_the_check_can_be_decoded(mode: str) -> None:
    tried = 0
    for kind in FORMATS:
        data = b""
        with suppress(OSError, KeyError, ValueError, SystemError):  # most formats lack most modes
            data = encoded(Image.new(mode, (8, 6)), kind)
        if not data:
            continue
        tried += 1
        if mode in ("I", "F") and kind in ("TIFF", "PPM") and (mode, kind) != ("I", "PPM"):
            for read in (examine, partial(decode, channels=1), partial(decode, channels=3)):
                with pytest.raises(ValueError, match="range"):
                    read(data)
            continue
        assert examine(data)[1] is None
        assert [decode(data, channels).shape for channels in (1, 3)] == [(1, 6, 8), (3, 6, 8)]
        assert decode(examine(data, 3)[1] or b"", 3).shape == (3, 3, 4)
    assert tried


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (50_000, 3), (400, 20)])
def test_a_very_long_image_takes_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    image = np.resize(ramp, size[::-1]) if size[0] > size[1] else np.repeat(ramp[:, None], size[0], axis=1)
    areas, whole = [], transforms._resized
    monkeypatch.setattr(transforms, "_resized", lambda x, *size: areas.append(math.prod(size)) or whole(x, *size))
    found = eval_transform(torch.from_numpy(image)[None].expand(3, -1, -1), settings(image_size=224))
    assert areas[0] <= 20 * 224 * 224
    assert found.shape == (3, 224, 224)
    assert abs(found.float().mean().item() - 127) < 3  # its centre
