"""Products of matrices against torch's own kernel, image by image."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_obdsd.data import resampling
from dist_obdsd.data.resampling import resample, stretches
from dist_obdsd.data.transforms import Frame, eval_frame, framed, train_frame
from dist_obdsd.rng import rng
from tests.data.pictures import settings
from tests.hostreads import HostReads

# Where the CPU has no AVX2, torch's kernel computes in float32, which rounds otherwise.
LEVELS = 0 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 1


def noise(draw: np.random.Generator, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)


def one_by_one(images: list[torch.Tensor], frames: list[Frame], s: int) -> torch.Tensor:
    return torch.stack([framed(image, frame, s) for image, frame in zip(images, frames, strict=True)])


def differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.dtype == b.dtype == torch.uint8
    assert a.shape == b.shape
    return (a.int() - b.int()).abs()


@pytest.mark.parametrize("s", [1, 24, 60])
def test_the_pixels_are_those_of_the_kernel_for_one_image(s: int) -> None:
    draw = np.random.default_rng(s)
    sizes = [
        (1, 1),
        (2, 90),
        (200, 3),
        (24, 24),
        (60, 60),
        (23, 25),
        (300, 400),
        (2000, 10),
        *draw.integers(1, 160, (25, 2)),
    ]
    images = [noise(draw, int(height), int(width)) for height, width in sizes]
    images += [torch.full((3, 900, 30), 255, dtype=torch.uint8), torch.zeros(3, 7, 11, dtype=torch.uint8)]
    frames = [train_frame(*image.shape[1:], settings(image_size=s), draw) for image in images]
    frames[-2] = frames[-2]._replace(top=0, left=0, height=900, width=30)
    assert {frame.mirrored for frame in frames} == {False, True}
    with HostReads() as reads:
        found = resample(images, frames, s)
    assert reads.found == []  # a GPU is not waited for
    assert differences(found, one_by_one(images, frames, s)).max() <= LEVELS
    mirrored = [frame._replace(mirrored=not frame.mirrored) for frame in frames]  # the control
    assert s == 1 or differences(found, one_by_one(images, mirrored, s)).max() > 9


def test_a_centre_is_within_a_level() -> None:
    draw = np.random.default_rng(0)
    images = [noise(draw, *draw.integers(5, 200, 2).tolist()) for _ in range(20)]
    config = settings(image_size=32, resize=40)
    frames = [eval_frame(*image.shape[1:], config) for image in images]
    far = differences(resample(images, frames, 32), one_by_one(images, frames, 32))
    assert far.max() <= 1
    assert far.float().mean() < 0.01


def test_an_image_is_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    images = [noise(draw, *draw.integers(5, 250, 2).tolist()) for _ in range(12)]
    frames = [train_frame(*image.shape[1:], settings(image_size=32), rng(i)) for i, image in enumerate(images)]
    together = resample(images, frames, 32)
    assert torch.equal(together, torch.cat([resample([a], [b], 32) for a, b in zip(images, frames, strict=True)]))
    assert torch.equal(together.flip(0), resample(images[::-1], frames[::-1], 32))
    taken = []
    inner = resampling._together
    monkeypatch.setattr(resampling, "_together", lambda parts, *rest: taken.append(len(parts)) or inner(parts, *rest))
    monkeypatch.setattr(resampling, "TOGETHER", 40_000)
    assert torch.equal(together, resample(images, frames, 32))
    assert len(taken) > 2
    assert sum(taken) == 12
    assert max(taken) > 1


@pytest.mark.parametrize("part", [1, 3, 8, 9, 50, 300, 1024])
def test_the_weights_are_whole_numbers_and_their_sums_with_pixels_are_exact(part: int) -> None:
    s = 8
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    weights, (bits,) = resampling._weights(part * one, s * one, zero, zero, s, part)
    upper, lower = weights[0].double().split(s)
    for some in (upper, lower):
        assert torch.equal(some, some.round())
        assert 0 <= some.min() <= some.max() < 256
        assert 255 * some.sum(1).max() < 2**24  # the whole numbers up to there are float32's
    whole = 256 * upper + lower
    scale = part / s
    wanted = torch.tensor(
        [[max(0.0, 1 - abs(j + 0.5 - scale * (i + 0.5)) / max(scale, 1)) for j in range(part)] for i in range(s)]
    ).double()
    wanted /= wanted.sum(1, keepdim=True)
    assert (whole / 2 ** int(bits) - wanted).abs().max() <= 0.5 / 2 ** int(bits) + 1e-7
    assert whole.max() < 2**15
    assert bits == 22 or 2 * wanted.max() * 2 ** int(bits) > 2**15 - 1  # as many bits as fit


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20), st.integers(1, 5000))
def test_stretches_hold_every_image_in_order_and_no_more_pixels_than_allowed(
    sizes: list[tuple[int, int]], most: int
) -> None:
    found = list(stretches(sizes, most))
    assert [i for start, end in found for i in range(start, end)] == list(range(len(sizes)))

    def pixels(start: int, end: int) -> int:
        return (end - start) * max(h for h, _ in sizes[start:end]) * max(w for _, w in sizes[start:end])

    for start, end in found:
        assert end == start + 1 or pixels(start, end) <= most
        assert end == len(sizes) or pixels(start, end + 1) > most  # none ends early
