"""Encoded images: their formats, checking one to the last pixel, and shrinking one.

Pillow opens everything but HEIC, which TorchCodec decodes where libheif is installed.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# What is read, and an image's suffix in a shard, by the format that its bytes have (a file name may lie). Naming the
# formats keeps out the plugins that run other programs.
SUFFIXES = {
    "AVIF": "avif", "BMP": "bmp", "GIF": "gif", "HEIC": "heic", "JPEG": "jpg", "MPO": "jpg",
    "PNG": "png", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp",
}  # fmt: skip
FORMATS = tuple(
    name for name in SUFFIXES if name not in ("MPO", "HEIC")
)  # a kind of JPEG, which its decoder tells apart itself
MEMBERS = tuple(sorted({*SUFFIXES.values(), "jpeg"}))  # the suffixes that an image may have in a shard
# The endings of files that may hold such an image.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
QUALITY = 95  # of a JPEG or WebP that is encoded again
MOST_PIXELS = 89_478_485  # 256 MiB as RGB; where Pillow warns, too, and at twice as many refuses by itself
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image refuses such an image with a sentence


def open_image(data: bytes) -> Image.Image:
    """Parse the header of an image of one of ``FORMATS``; its pixels are decoded when they are asked for.

    Raises:
        ValueError: a small file says that it holds more pixels than memory should be given for.
        PIL.UnidentifiedImageError and whatever else Pillow raises: it is no such image.
    """
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
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


def _decode_heic(data: bytes) -> Image.Image:
    """Decode a HEIC image, which libheif turns upright.

    Raises:
        ValueError: TorchCodec or libheif is missing.
        RuntimeError: the image is broken.
    """
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


def examine(data: bytes, resize: int | None = None) -> tuple[str, bytes | None]:
    """Decode an image to the last pixel, and shrink it where asked.

    Args:
        data: the encoded image.
        resize: the shorter side's largest length in pixels; None leaves every image as it is.

    Returns:
        The suffix and, only where the image was too large, the new encoded image. That is a WebP where it was one, a
        JPEG where it was a JPEG, HEIC or AVIF (quality 95), else a PNG. The EXIF orientation is applied, of 16 bits the
        upper eight are kept, and metadata are dropped.

    Raises:
        ValueError: the image is damaged or of another kind; the message says how.
    """
    try:
        # verify() sees wrong checksums that load() passes over; load() sees missing data. An image serves only one.
        with open_image(data) as image:
            image.verify()
        with open_image(data) as image:
            suffix = SUFFIXES[image.format or ""]
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of which nobody knows the range")
            image.load()
            upright = ImageOps.exif_transpose(image)  # also without resizing: training will parse the EXIF data
            if resize is None or min(image.size) <= resize:
                return suffix, None
            return _shrink(upright, suffix, resize)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"its format is none of {', '.join(FORMATS)}, HEIC") from error
    except Exception as error:
        # The decoders raise whatever their parsers trip over; each of these is a fault of this one file.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _shrink(image: Image.Image, suffix: str, resize: int) -> tuple[str, bytes]:
    if image.mode.startswith("I"):
        # 16 bits of grey, which the library's own conversion may clip.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info.clear()  # a colour profile or comment would be written along
    stream = io.BytesIO()
    if suffix == "webp":
        image.save(stream, "WEBP", quality=QUALITY)
        return suffix, stream.getvalue()
    if suffix in ("jpg", "heic", "avif") and image.mode in ("L", "RGB"):
        image.save(stream, "JPEG", quality=QUALITY)
        return "jpg", stream.getvalue()
    image.save(stream, "PNG")
    return "png", stream.getvalue()
