"""From a decoded image to the uint8 square that the network takes (which normalises it itself).

A colour image stays as it was decoded, with the channels of a pixel side by side in memory: torch resizes that layout
quickest.

Every random parameter of a row comes from the generator that is handed in, and every row is transformed by itself, so
the result does not depend on the batch that a row stands in.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dist_obdsd.config.sections import DataConfig

AFFINE_DEGREES = 10.0
AFFINE_SHIFT = 0.1
AFFINE_SCALE = (0.9, 1.1)
AFFINE_SHEAR_DEGREES = 5.0
CROP_RATIO = (3 / 4, 4 / 3)
LONGEST = 16  # times its shorter side, of an image that is resized for evaluation
# Shares and largest changes of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, its code's `--aug-plus` without the blur).
JITTER_SHARE = 0.8
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
GREY_SHARE = 0.2


def eval_transform(image: Tensor, config: DataConfig) -> Tensor:
    """Resize and crop as in evaluation: uint8 [C, H, W] -> [C, s, s].

    The shorter side becomes ``config.resize`` (default image_size), and the centre square is taken.
    """
    s, shorter = config.image_size, config.resize or config.image_size
    short = min(image.shape[1:])
    # Of a very long image only the part around the square, since all of it could fill the memory.
    image = functional.center_crop(image, [min(side, LONGEST * short) for side in image.shape[1:]])
    rows, columns = (shorter * side // short for side in image.shape[1:])
    top, left = round((rows - s) / 2), round((columns - s) / 2)
    return _resized(image, rows, columns)[:, top : top + s, left : left + s].contiguous()


def train_transform(image: Tensor, config: DataConfig, generator: np.random.Generator) -> Tensor:
    """uint8 [C, H, W] -> [C, s, s] with the augmentation that ``config.augment`` names.

    Args:
        generator: this row's own; all its random parameters are drawn from it.
    """
    if config.augment == "none":
        return eval_transform(image, config)
    if config.augment == "affine":
        return _random_affine(image, config, generator)
    # RandomResizedCrop (Szegedy et al. 2015), and a horizontal flip with probability 1/2.
    top, left, height, width = _crop_box(image.shape[1], image.shape[2], config.crop_scale, generator)
    mirrored = generator.random() < 0.5
    part = image[:, top : top + height, left : left + width]
    image = _resized(part, config.image_size, config.image_size)
    image = image.flip(-1) if mirrored else image
    return _random_colours(image, generator) if config.augment == "strong" else image


def _resized(image: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [C, H, W] -> [C, rows, columns], antialiased."""
    # Copied for the resize, which else works in a slower layout.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return functional.resize(image, [rows, columns], antialias=True)[0]


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
