import math
from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from dist_obdsd.data import transforms
from dist_obdsd.data.decoding_workers import DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.images import decode
from dist_obdsd.data.transforms import eval_transform, train_transform
from dist_obdsd.errors import InputError
from dist_obdsd.rng import rng
from tests.data.pictures import assert_close, colours, encoded, noise, settings


def coloured(height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.from_numpy(colours(height, width)).permute(2, 0, 1)


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre() -> None:
    image = coloured(40, 80)
    assert torch.equal(eval_transform(image, settings(image_size=20, resize=40)), image[:, 10:30, 30:50])
    assert torch.equal(train_transform(image, settings(augment="none"), rng(0)), eval_transform(image, settings()))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (50_000, 3), (400, 20)])
def test_a_very_long_image_takes_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.add.outer(*(np.linspace(0, 255 * (side == max(size)), side) for side in size[::-1])).astype(np.uint8)
    areas, whole = [], transforms._resized
    monkeypatch.setattr(transforms, "_resized", lambda x, *size: areas.append(math.prod(size)) or whole(x, *size))
    found = eval_transform(torch.from_numpy(image)[None].expand(3, -1, -1), settings(image_size=224))
    assert areas[0] <= 20 * 224 * 224
    assert found.shape == (3, 224, 224)
    assert abs(found.float().mean().item() - 127) < 3  # its centre


@pytest.mark.parametrize("augment", ["crop", "strong", "affine"])
def test_a_row_is_a_function_of_its_generator(augment: str) -> None:
    image, config = coloured(), settings(augment=augment)
    first = train_transform(image, config, rng(0, "augment", 1, 2, 3))
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.uint8
    torch.manual_seed(1)  # torch's own randomness plays no part
    assert torch.equal(first, train_transform(image, config, rng(0, "augment", 1, 2, 3)))
    assert not torch.equal(first, train_transform(image, config, rng(0, "augment", 1, 2, 4)))


def test_pixels_are_those_that_pillow_resizes() -> None:
    """Within one level: the two round differently."""
    noise = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((45, 30), Image.Resampling.BILINEAR)
    for source in (Image.fromarray(noise), smooth, smooth.resize((7, 5)), smooth.convert("L")):
        channels = len(source.getbands())
        image = decode(encoded(source, "PNG"), channels)
        config = settings(image_size=24, resize=32, channels=channels)
        wanted = functional.center_crop(functional.resize(source, [32], antialias=True), [24, 24])
        assert_close(eval_transform(image, config), np.asarray(wanted), 1)
        for seed in range(20):
            draw = rng(seed)
            top, left, height, width = transforms._crop_box(source.height, source.width, config.crop_scale, draw)
            part = source.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BILINEAR)
            pixels = np.asarray(part)
            pixels = pixels[:, ::-1] if draw.random() < 0.5 else pixels
            assert_close(train_transform(image, config, rng(seed)), pixels, 1)


@pytest.mark.parametrize("augment", ["none", "crop", "strong", "affine"])
def test_an_image_smaller_than_the_crop_fills_it(augment: str) -> None:
    for channels, height, width in ((1, 1, 1), (3, 2, 3), (1, 1, 40), (3, 19, 5)):
        config = settings(augment=augment, channels=channels, image_size=20, resize=24)
        found = train_transform(torch.full((channels, height, width), 130, dtype=torch.uint8), config, rng(0, augment))
        assert found.shape == (channels, 20, 20)
        assert found.flatten(1).float().std(dim=1).max() <= 1  # one colour, however it was changed


def test_colours_change_as_often_and_as_far_as_in_moco(monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes are torchvision's; which come, in which order and how far, is ours."""
    drawn: list[tuple[str, float]] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        change = lambda image, by, name=name: drawn.append((name, by)) or image  # noqa: E731
        monkeypatch.setattr(functional, f"adjust_{name}", change)
    image = torch.tensor([[100, 40], [150, 60], [50, 200]], dtype=torch.uint8)[:, None]
    grey, orders = 0, Counter[tuple[str, ...]]()
    for i in range(1000):
        drawn.clear()
        found = transforms._random_colours(image, rng(i))
        grey += torch.equal(found[0], found[1])
        orders[tuple(name for name, _ in drawn)] += 1
        assert all(abs(by) <= 0.1 if name == "hue" else 0.6 <= by <= 1.4 for name, by in drawn)
    assert 150 < grey < 250
    assert 150 < orders.pop(()) < 250
    assert len(orders) == 24  # every order of the four


def test_crop_keeps_the_share_that_was_asked_for_and_flips_half() -> None:
    y, x = np.mgrid[:64, :96]
    image = torch.from_numpy(np.stack([x * 2, y * 3, x * 0]).astype(np.uint8))  # pixels tell where they come from
    found = torch.stack([train_transform(image, settings(crop_scale=(0.2, 0.5)), rng(i)) for i in range(150)]).float()
    lowest_NC, highest_NC = found.amin((2, 3)), found.amax((2, 3))
    width_N, height_N = ((highest_NC - lowest_NC)[:, :2] / torch.tensor([2, 3]) * 16 / 15).unbind(1)
    areas_N = width_N * height_N / (64 * 96)
    assert 0.15 < areas_N.min() < 0.25
    assert 0.44 < areas_N.max() < 0.56
    assert 50 < (found[:, 0, 0, 0] > found[:, 0, 0, -1]).sum() < 100


def test_affine_fills_with_the_background_and_moves_within_its_bounds() -> None:
    config = settings(augment="affine", image_size=32, channels=1)
    blank = torch.full((1, 50, 40), 230, dtype=torch.uint8)
    blank[:, 20:30, 16:24] = 10
    found = np.stack([train_transform(blank, config, rng(i))[0].numpy() for i in range(120)])
    assert (found[:, 0] == 230).all()  # a gap would be 0
    ink, (y, x) = 230.0 - found, np.mgrid[:32, :32] + 0.5
    sums = ink.sum((1, 2))
    offsets = np.stack([(ink * y).sum((1, 2)), (ink * x).sum((1, 2))]) / sums - 16
    assert 0.1 * 32 * 0.7 < np.abs(offsets).max() < 0.1 * 32 * 1.3
    assert np.abs(offsets.mean(axis=1)).max() < 0.5
    areas = sums / sums.mean()
    assert 0.75 < areas.min() < 0.9  # scale squared: 0.81 to 1.21
    assert 1.1 < areas.max() < 1.3
    assert train_transform(255 - blank, config, rng(0))[0, 0].eq(25).all()


@pytest.mark.parametrize(("height", "width"), [(80, 40), (30, 30)])
def test_rectangles_are_cropped_padded_and_squashed(height: int, width: int) -> None:
    config = settings(image_size=[16, 32], mean=(0.2, 0.4, 1.0))
    how = [config.model_copy(update={"fit": fit}) for fit in ("crop", "squash", "pad")]
    crop, squash, pad = (eval_transform(coloured(height, width), config) for config in how)
    assert crop.shape == squash.shape == pad.shape == (3, 16, 32)
    # Red grows to the right over the whole width, green downwards over the whole height.
    assert (squash[0, 0, 0], squash[1, 0, 0]) < (20, 20)
    assert min(squash[0, -1, -1], squash[1, -1, -1]) > 235
    assert crop[0, 0, 0] < 20
    assert crop[0, 0, -1] > 235
    assert crop[1, 0, 0] > 50  # above it, something was cut off
    side = (32 - round(16 * width / height)) // 2
    assert pad[:, 0, 0].tolist() == pad[:, -1, -1].tolist() == [51, 102, 255]
    assert (pad[2, :, side + 1 : 31 - side] == 40).all()  # blue is the image's own
    assert pad[1, 0, 16] < 20
    # An image of the size's own proportions is only resized.
    crop, squash, pad = (eval_transform(coloured(40, 80), config) for config in how)
    assert torch.equal(crop, squash)
    assert torch.equal(crop, pad)


PLUG_IN = """
from torchvision.transforms.v2 import functional
def dark(image, generator, size):
    return (functional.resize(image, list(size)) * generator.uniform(0, 0.5)).byte()
def wrong(image, generator, size):
    return image.float()
broken = lambda image, generator, size: image / []
"""


def test_a_plug_in_transforms_images(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_augment.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    image, config = coloured(), settings(augment="my_augment:dark", image_size=[8, 16])
    found = train_transform(image, config, rng(0, 1))
    assert found.shape == (3, 8, 16)
    assert found.max() <= 127
    assert torch.equal(found, train_transform(image, config, rng(0, 1)))
    assert not torch.equal(found, train_transform(image, config, rng(0, 2)))
    for name, fact in (
        ("my_augment:wrong", r"returned torch.float32 \[3, 10, 12\]; it must return uint8 \[3, 16, 16\]"),
        ("my_augment:broken", "data.augment=my_augment:broken fails with TypeError.* line 7"),
        ("no_such:thing", "data.augment=no_such:thing cannot be imported"),
    ):
        jobs = iter([DecodeJob(0, [DecodeTask(0, noise(1), (0, 0, 0))])])
        run = SimpleNamespace(seed=0, data=settings(augment=name, workers=1))
        with closing(Decoder(jobs, 1, run, 1)) as decoder, pytest.raises(InputError, match=fact):
            next(decoder)
