"""Transforms of a decoded image to the uint8 image that the network takes.

Every random parameter of a row comes from the generator that is handed in, and every row is transformed by itself, so
the result does not depend on the batch that a row stands in.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dist_obdsd.config.registry import import_object, plug_in
from dist_obdsd.config.sections import DataConfig
from dist_obdsd.errors import InputError

AFFINE_DEGREES = 10.0
AFFINE_SHIFT = 0.1
AFFINE_SCALE = (0.9, 1.1)
AFFINE_SHEAR_DEGREES = 5.0
CROP_RATIO = (3 / 4, 4 / 3)
LONGEST = 16  # times its shorter side, of an image that is resized or padded as a whole
# Shares and largest changes of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, its code's `--aug-plus` without the blur).
JITTER_SHARE = 0.8
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
GREY_SHARE = 0.2


def eval_transform(image: Tensor, config: DataConfig) -> Tensor:
    """Make an image fit as in evaluation: uint8 [C, H, W] -> [C, h, w].

    With ``config.fit`` crop it is resized to cover the size (with ``config.resize`` larger by resize / min(h, w)), and
    the centre is taken.
    """
    h, w = config.size
    image = _bounded(image)
    if config.fit != "crop":
        return _resized(_padded(image, config) if config.fit == "pad" else image, h, w).contiguous()
    shorter = config.resize or min(h, w)
    covered = (shorter * h // min(h, w), shorter * w // min(h, w))
    height, width = image.shape[1:]
    # The side that is short for the size's proportions becomes as long as that of the size.
    side, of = (covered[0], height) if height * w <= width * h else (covered[1], width)
    rows, columns = side * height // of, side * width // of
    top, left = round((rows - h) / 2), round((columns - w) / 2)
    return _resized(image, rows, columns)[:, top : top + h, left : left + w].contiguous()


def _bounded(image: Tensor) -> Tensor:
    """Take the centre of a very long image, since all of it could fill the memory."""
    return functional.center_crop(image, [min(side, LONGEST * min(image.shape[1:])) for side in image.shape[1:]])


def train_transform(image: Tensor, config: DataConfig, generator: np.random.Generator) -> Tensor:
    """Augment an image as ``config.augment`` says: uint8 [C, H, W] -> [C, h, w]."""
    if config.augment == "none":
        return eval_transform(image, config)
    if ":" in config.augment:
        with plug_in(f"data.augment={config.augment}"):
            return _checked(load_augment(config.augment)(image, generator, config.size), config)
    if config.fit == "pad":
        image = _padded(_bounded(image), config)
    h, w = config.size
    if config.augment == "affine":
        return _random_affine(image, config, generator)
    # RandomResizedCrop (Szegedy et al. 2015), and a horizontal flip with probability 1/2.
    height, width = image.shape[1:]
    proportion = width / height if config.fit == "squash" else w / h
    top, left, height, width = _crop_box(height, width, config.crop_scale, generator, proportion)
    mirrored = generator.random() < 0.5
    image = _resized(image[:, top : top + height, left : left + width], h, w)
    image = image.flip(-1) if mirrored else image
    return _random_colours(image, generator) if config.augment == "strong" else image


@cache
def load_augment(name: str) -> Callable[[Tensor, np.random.Generator, tuple[int, int]], Tensor]:
    """Import the plug-in ``package:function``, or raise InputError."""
    found: Callable[..., Tensor] = import_object(name, "data.augment")
    return found


def _checked(image: Tensor, config: DataConfig) -> Tensor:
    wanted = (config.channels, *config.size)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or tuple(image.shape) != wanted:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"data.augment={config.augment} returned {found}; it must return uint8 {list(wanted)}")
    return image


def _padded(image: Tensor, config: DataConfig) -> Tensor:
    """Give an image the proportions of ``config.size`` by borders of the mean colour."""
    (h, w), (height, width) = config.size, image.shape[1:]
    rows, columns = max(height, round(width * h / w)), max(width, round(height * w / h))
    assert config.mean is not None, "a Config fills it in"
    colour = (255 * torch.tensor(config.mean)).round().tolist()
    top, left = (rows - height) // 2, (columns - width) // 2
    return functional.pad(image, [left, top, columns - width - left, rows - height - top], fill=colour)


def _resized(image: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [C, H, W] -> [C, rows, columns], antialiased."""
    # A pixel's channels side by side, as they were decoded: the layout that is resized quickest.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return functional.resize(image, [rows, columns], antialias=True)[0]


def _random_colours(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation, hue in random order, then grey.

    A grey image has no saturation and no hue to change.
    """
    changes = (
        (functional.adjust_brightness, 1 - BRIGHTNESS, 1 + BRIGHTNESS),
        (functional.adjust_contrast, 1 - CONTRAST, 1 + CONTRAST),
        (functional.adjust_saturation, 1 - SATURATION, 1 + SATURATION),
        (functional.adjust_hue, -HUE, HUE),
    )
    if generator.random() < JITTER_SHARE:
        for number in generator.permutation(4).tolist():
            change, low, high = changes[number]
            image = change(image, generator.uniform(low, high))
    return functional.rgb_to_grayscale(image, len(image)) if generator.random() < GREY_SHARE else image


def _crop_box(
    height: int, width: int, scale: tuple[float, float], generator: np.random.Generator, proportion: float = 1.0
) -> tuple[int, int, int, int]:
    """Draw top, left, height, width, with a ratio in CROP_RATIO times ``proportion``."""
    narrow, wide = (ratio * proportion for ratio in CROP_RATIO)
    low, high = math.log(narrow), math.log(wide)
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    # Nothing fitted (a very long image): the largest allowed part of its centre.
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_affine(image: Tensor, config: DataConfig, generator: np.random.Generator) -> Tensor:
    """Squash to the size, then one small affine map; gaps get the background."""
    h, w = config.size
    if tuple(image.shape[1:]) != (h, w):
        image = functional.resize(image, [h, w], antialias=True)
    angle, shift_x, shift_y, zoom, shear = generator.uniform(-1, 1, 5).tolist()
    angle = math.radians(AFFINE_DEGREES) * angle
    tangent = math.tan(math.radians(AFFINE_SHEAR_DEGREES) * shear)
    low, high = AFFINE_SCALE
    scale = (low + high) / 2 + (high - low) / 2 * zoom
    # The map from output to input in coordinates from -1 to 1: rotation times shear, scaled; half the side is 1.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    matrix = torch.tensor(
        [
            [cos, (cos * tangent - sin) * h / w, 2 * AFFINE_SHIFT * shift_x],
            [sin * w / h, sin * tangent + cos, 2 * AFFINE_SHIFT * shift_y],
        ]
    )
    grid = torch.nn.functional.affine_grid(matrix[None], [1, image.shape[0], h, w], align_corners=False)
    border = torch.cat([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], dim=1)
    background = border.median(dim=1).values.float()[:, None, None]
    # Outside, grid_sample gives 0: with the background taken off first, that is the background.
    centred = image.float() - background
    moved = torch.nn.functional.grid_sample(centred[None], grid, mode="bilinear", align_corners=False)[0]
    return (moved + background).round_().clamp_(0, 255).to(torch.uint8)
