"""Encoded images: decoding one, checking one to the last pixel, and shrinking one.

Pillow reads every header and most kinds of image. TorchCodec, where it is installed, decodes plain JPEGs to the
same pixels in less time, and HEIC with libheif. What it refuses, Pillow looks at and says why. Of the metadata only the
orientation counts, so no damage to the others costs an image.
"""

import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

try:
    from torchcodec.decoders import decode_jpeg as _decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or made for another torch
    _decode_jpeg = None  # type: ignore[assignment]

T = TypeVar("T")
# What is read, and an image's suffix in a shard, by the format that its bytes have (a file name may lie). Naming the
# formats keeps out the plugins that run other programs.
SUFFIXES = {
    "AVIF": "avif", "BMP": "bmp", "GIF": "gif", "HEIC": "heic", "JPEG": "jpg", "MPO": "jpg",
    "PNG": "png", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp",
}  # fmt: skip
# MPO is a kind of JPEG, which its decoder tells apart itself.
FORMATS = tuple(name for name in SUFFIXES if name not in ("MPO", "HEIC"))
MEMBERS = tuple(sorted({*SUFFIXES.values(), "jpeg"}))  # the suffixes that an image may have in a shard
# The endings of files that are images, whatever they hold. Others are looked into.
IMAGE_SUFFIXES = (*(f".{member}" for member in MEMBERS), ".heif", ".pbm", ".pgm", ".tiff")
QUALITY = 95  # of a JPEG or WebP that is encoded again
MOST_PIXELS = 89_478_485  # 256 MiB as RGB; where Pillow warns, too, and at twice as many refuses by itself
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
PNG_NEEDED = (b"tRNS", b"eXIf")  # besides what every decoder needs: transparency and orientation
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image refuses such an image with a sentence


@contextmanager
def _explained() -> Iterator[None]:
    """Turn every failure on an image into a ValueError that says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd but harmless metadata draw some that nobody could act on
            yield
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"its format is none of {', '.join(FORMATS)}, HEIC") from error
    except Exception as error:  # Pillow's plugins raise nearly every built-in type on broken files
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


@_explained()
def decode(data: bytes, channels: int, exif: bool = True) -> Tensor:
    """Decode an image to uint8 [channels, H, W] (1: grey, 3: RGB) of any strides.

    The EXIF orientation is applied (unless ``exif`` is false; HEIC is always upright); palette, CMYK and 1-bit images
    are converted; alpha is composited on white; of 16 bits the upper eight are kept; of several frames or pages the
    first is taken.

    Raises:
        ValueError: the image cannot be decoded; the text says why.
    """
    if channels == 3 and data.startswith(b"\xff\xd8") and _decode_jpeg is not None:
        image = open_image(data)
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in UPRIGHT:
            with suppress(RuntimeError):  # Pillow finds out why
                decoded = _decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
                assert isinstance(decoded, Tensor)
                return decoded
    return pixels(_despite_metadata(lambda data: upright(open_image(data), exif), data), channels)


@_explained()
def examine(data: bytes, resize: int | None = None) -> tuple[str, bytes | None]:
    """Decode an image as training will; shrink a shorter side above ``resize`` pixels.

    Returns:
        The suffix and, only where the image was too large, the new encoded image. That is a WebP where it was one, a
        JPEG where it was a JPEG, HEIC or AVIF (quality 95), else a PNG. The EXIF orientation is applied, of 16 bits the
        upper eight are kept, and metadata are dropped.

    Raises:
        ValueError: the image is damaged or of another kind; the message says how.
    """
    # verify() sees wrong checksums that load() passes over; load() sees missing data. An image serves only one.
    _despite_metadata(lambda data: open_image(data).verify(), data)
    image = _despite_metadata(lambda data: upright(open_image(data)), data)
    suffix = SUFFIXES[image.format or ""]
    _converted(image, "RGB")
    return (suffix, None) if resize is None or min(image.size) <= resize else _shrink(image, suffix, resize)


def pixels(image: Image.Image, channels: int) -> Tensor:
    """Convert an upright image as ``decode`` says, or raise what Pillow raises."""
    tensor = torch.from_numpy(np.array(_converted(image, "L" if channels == 1 else "RGB")))
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


def upright(image: Image.Image, exif: bool = True) -> Image.Image:
    """Load an image and, if ``exif``, turn it as its EXIF orientation says."""
    image.load()
    turn = UPRIGHT.get(_orientation(image)) if exif else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def may_be_image(head: bytes) -> bool:
    """Tell from its first 16 bytes whether a file may be an image that can be read."""
    Image.init()
    return _is_heic(head) or any(accept(head) for name in FORMATS if (accept := Image.OPEN[name][1]))


def open_image(data: bytes) -> Image.Image:
    """Parse the header of an image; its pixels are decoded when they are asked for.

    Raises:
        ValueError: a small file says that it holds more pixels than memory should be given for.
        PIL.UnidentifiedImageError and whatever else Pillow raises: it is no such image.
    """
    if _is_heic(data):
        return _decode_heic(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; make the image smaller") from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels and more than {MOST_PIXELS:,} are refused, since a small "
            f"file can claim any number; make the image smaller"
        )
    return image


def _despite_metadata(read: Callable[[bytes], T], data: bytes) -> T:
    """Read an image; a PNG that fails is read again without its metadata."""
    try:
        return read(data)
    except Exception:
        parts, at = [data[:8]], 8
        while data.startswith(b"\x89PNG\r\n\x1a\n") and at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kind, sound = data[at + 4 : at + 8], zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
            if kind[:1].isupper() or (kind in PNG_NEEDED and data[end - 4 : end] == sound):
                parts.append(data[at:end])
            at = end
        if at in (8, sum(map(len, parts))):
            raise
        return read(b"".join(parts))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a damaged block
        return None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    signed = 2 in getattr(image, "tag_v2", {}).get(339, ())
    if image.mode == "F" or signed or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these have 16 bits
        kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"its pixels are {kind}, of which nobody knows the range; convert them to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _upper_eight(image)
    elif image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)
    elif image.mode == "LAB":  # has no way to grey but this
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _upper_eight(image: Image.Image) -> Image.Image:
    """Keep the upper eight bits, where Pillow's own conversion may clip."""
    tags = getattr(image, "tag_v2", {})
    upper = (np.asarray(image).astype(np.int64) >> (max(tags.get(258, (16,))) - 8)).clip(0, 255)
    return Image.fromarray((255 - upper if tags.get(262) == 0 else upper).astype(np.uint8))  # 0 may be white


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS


def _decode_heic(data: bytes) -> Image.Image:
    """Decode a HEIC image, upright; a broken one is a RuntimeError."""
    try:
        from torchcodec.decoders import decode_heic

        pixels_CHW = decode_heic(data, mode="UNCHANGED")
    except ImportError as error:
        raise ValueError(
            "HEIC needs the packages torchcodec and libheif (apt install libheif1); install both"
        ) from error
    image = Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())
    image.format = "HEIC"
    return image


def _shrink(image: Image.Image, suffix: str, resize: int) -> tuple[str, bytes]:
    if image.mode.startswith("I"):
        image = _upper_eight(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info.clear()  # a colour profile or comment would be written along
    kind = "WEBP" if suffix == "webp" else "PNG"
    if suffix in ("jpg", "heic", "avif") and image.mode in ("L", "RGB"):
        kind = "JPEG"
    stream = io.BytesIO()
    image.save(stream, kind, **({} if kind == "PNG" else {"quality": QUALITY}))
    return SUFFIXES[kind], stream.getvalue()
