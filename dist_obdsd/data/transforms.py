"""From encoded bytes to the uint8 square that the network takes (which normalises it itself).

Pillow reads every header and most kinds of image. The pixels of a plain JPEG come from torchvision's decoder, which
gives the same ones in less time; what it refuses, Pillow looks at and says why. A colour image stays as it was decoded,
with the channels of a pixel side by side in memory: torch resizes that layout quickest.

Every random parameter of a row comes from the generator that is handed in, and every row is transformed by itself, so
the result does not depend on the batch that a row stands in.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from dist_obdsd.config import DataConfig
from dist_obdsd.data.images import FORMATS, open_image

AFFINE_DEGREES = 10.0
AFFINE_SHIFT = 0.1
AFFINE_SCALE = (0.9, 1.1)
AFFINE_SHEAR_DEGREES = 5.0
CROP_RATIO = (3 / 4, 4 / 3)
# Shares and largest changes of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, its code's `--aug-plus` without the blur).
JITTER_SHARE = 0.8
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
GREY_SHARE = 0.2


def decode(data: bytes, channels: int) -> Tensor:
    """Decode an image (of one of ``FORMATS``) to uint8 [channels, H, W] (1: grey, 3: RGB) of any strides.

    The EXIF orientation is applied; palette, CMYK and 1-bit images are converted; alpha is composited on white; of
    16 bits the upper eight are kept; of several frames or pages the first is taken.

    Raises:
        ValueError: the image cannot be decoded; the text says why.
    """
    try:
        with warnings.catch_warnings():
            # Odd but harmless metadata draw warnings that nobody could act on.
            warnings.simplefilter("ignore")
            image = open_image(data)
            if channels == 3 and image.format == "JPEG" and image.mode == "RGB" and _upright(image):
                try:
                    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
                except RuntimeError:
                    pass  # Pillow finds out why
            ImageOps.exif_transpose(image, in_place=True)
            return pixels(image, channels)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"its format is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise nearly every built-in type on broken files
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of what any JPEG decoder may be given; None: ``decode`` has to look at it.

    That is a JPEG of three components, Y, Cb and Cr, which stands upright and whose end is there: not every decoder
    minds when it is missing.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.format != "JPEG":
                return None
            components = [component[0] for component in image.layer]
            coded = components == [1, 2, 3] and image.info.get("adobe_transform", 1) == 1
            return (image.height, image.width) if coded and _upright(image) else None
    except Exception:  # as in ``decode``, which says what is wrong
        return None


def pixels(image: Image.Image, channels: int) -> Tensor:
    """An image that stands upright as uint8 [channels, H, W], converted as ``decode`` says.

    Raises:
        ValueError and whatever else Pillow raises: the image cannot be decoded or converted.
    """
    tensor = torch.from_numpy(np.array(_converted(image, "L" if channels == 1 else "RGB")))
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


def _upright(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows the range")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion may clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)
    return image.convert(mode)


class Frame(NamedTuple):
    """Which square of an image is taken: a part of the image is resized, and the square lies in the result."""

    top: int
    left: int
    height: int
    width: int
    rows: int
    """Height of the resized part."""
    columns: int
    down: int
    """First row of the square in the resized part."""
    right: int
    mirrored: bool


def eval_frame(height: int, width: int, config: DataConfig) -> Frame:
    """Of an image of this size: the shorter side becomes ``resize`` (default image_size), and the centre is taken."""
    s, shorter = config.image_size, config.resize or config.image_size
    rows, columns = (shorter * side // min(height, width) for side in (height, width))
    return Frame(0, 0, height, width, rows, columns, round((rows - s) / 2), round((columns - s) / 2), False)


def train_frame(height: int, width: int, config: DataConfig, generator: np.random.Generator) -> Frame:
    """What ``config.augment`` takes of an image of this size; of `affine` nothing is known yet.

    ``crop`` and ``strong``: RandomResizedCrop (Szegedy et al. 2015) and a horizontal flip with probability 1/2.
    """
    if config.augment == "none":
        return eval_frame(height, width, config)
    box = _crop_box(height, width, config.crop_scale, generator)
    return Frame(*box, config.image_size, config.image_size, 0, 0, generator.random() < 0.5)


def framed(image: Tensor, frame: Frame, size: int) -> Tensor:
    """uint8 [C, H, W] -> [C, size, size], antialiased."""
    part = image[None, :, frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
    # Copied for the resize, which else works in a slower layout.
    part = part.contiguous(memory_format=torch.channels_last)
    part = functional.resize(part, [frame.rows, frame.columns], antialias=True)[0]
    square = part[:, frame.down : frame.down + size, frame.right : frame.right + size]
    return square.flip(-1) if frame.mirrored else square


def eval_transform(image: Tensor, config: DataConfig) -> Tensor:
    """uint8 [C, H, W] -> [C, s, s], as ``eval_frame`` says."""
    return framed(image, eval_frame(image.shape[1], image.shape[2], config), config.image_size).contiguous()


def train_transform(image: Tensor, config: DataConfig, generator: np.random.Generator) -> Tensor:
    """uint8 [C, H, W] -> [C, s, s] with the augmentation that ``config.augment`` names.

    Args:
        generator: this row's own; all its random parameters are drawn from it.
    """
    if config.augment == "affine":
        return _random_affine(image, config, generator)
    image = framed(image, train_frame(image.shape[1], image.shape[2], config, generator), config.image_size)
    return _random_colours(image, generator) if config.augment == "strong" else image


def _random_colours(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed in random order, then grey; each only in a share of the images.

    A grey image has no saturation and no hue to change.
    """
    if generator.random() < JITTER_SHARE:
        for change in generator.permutation(4).tolist():
            if change == 0:
                image = functional.adjust_brightness(image, generator.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
            elif change == 1:
                image = functional.adjust_contrast(image, generator.uniform(1 - CONTRAST, 1 + CONTRAST))
            elif change == 2:
                image = functional.adjust_saturation(image, generator.uniform(1 - SATURATION, 1 + SATURATION))
            else:
                image = functional.adjust_hue(image, generator.uniform(-HUE, HUE))
    return functional.rgb_to_grayscale(image, len(image)) if generator.random() < GREY_SHARE else image


def _crop_box(
    height: int, width: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width: an area share uniform in ``scale``, a ratio log-uniform in CROP_RATIO; ten tries."""
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    # Nothing fitted (a very long image): the largest allowed part of its centre.
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_affine(image: Tensor, config: DataConfig, generator: np.random.Generator) -> Tensor:
    """Resize to the square, then one small affine map, bilinear, the gaps filled with the image's own background."""
    s = config.image_size
    if tuple(image.shape[1:]) != (s, s):
        image = functional.resize(image, [s, s], antialias=True)
    angle, shift_x, shift_y, zoom, shear = generator.uniform(-1, 1, 5).tolist()
    angle = math.radians(AFFINE_DEGREES) * angle
    tangent = math.tan(math.radians(AFFINE_SHEAR_DEGREES) * shear)
    low, high = AFFINE_SCALE
    scale = (low + high) / 2 + (high - low) / 2 * zoom
    # The map from output to input in coordinates from -1 to 1: rotation times shear, scaled; half the side is 1.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    matrix = torch.tensor(
        [
            [cos, cos * tangent - sin, 2 * AFFINE_SHIFT * shift_x],
            [sin, sin * tangent + cos, 2 * AFFINE_SHIFT * shift_y],
        ]
    )
    grid = torch.nn.functional.affine_grid(matrix[None], [1, image.shape[0], s, s], align_corners=False)
    background = _background(image)
    # Outside, grid_sample gives 0: with the background taken off first, that is the background.
    centred = image.float() - background
    moved = torch.nn.functional.grid_sample(centred[None], grid, mode="bilinear", align_corners=False)[0]
    return (moved + background).round_().clamp_(0, 255).to(torch.uint8)


def _background(image: Tensor) -> Tensor:
    """[C, 1, 1] float: the median of the border pixels of each channel."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], dim=1)
    return border.median(dim=1).values.float()[:, None, None]
