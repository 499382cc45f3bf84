import io

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.config import Data
from dist_obdsd.data.transforms import decode, eval_transform, train_transform
from dist_obdsd.seeds import rng


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colours(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth image, so that lossy formats stay close to it: red grows to the right, green downwards, blue is 40."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], axis=2).astype(np.uint8)


def settings(**changes: object) -> Data:
    return Data.model_validate({"shards": "x", "image_size": 16, "mean": (0.5,), "std": (0.5,)} | changes)


def assert_close(found: torch.Tensor, wanted: np.ndarray, within: int = 0) -> None:
    wanted = wanted[None] if wanted.ndim == 2 else wanted.transpose(2, 0, 1)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy().astype(int) - wanted.astype(int)).max() <= within


@pytest.mark.parametrize(("kind", "within"), [("PNG", 0), ("JPEG", 6), ("WEBP", 12), ("BMP", 0), ("TIFF", 0)])
def test_plain_colour(kind: str, within: int) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"quality": 100} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(colours()), kind, **options)
    assert_close(decode(data, 3), colours(), within)
    grey = np.asarray(Image.fromarray(colours()).convert("L"))
    assert_close(decode(data, 1), grey, within)


def test_one_bit_palette_and_grey() -> None:
    bits = (np.arange(105 * 105).reshape(105, 105) % 3 == 0).astype(np.uint8) * 255
    data = encoded(Image.fromarray(bits).convert("1"), "PNG")
    assert_close(decode(data, 1), bits)
    assert_close(decode(data, 3), np.repeat(bits[:, :, None], 3, axis=2))
    palette = Image.fromarray(colours()).quantize(64)
    assert_close(decode(encoded(palette, "PNG"), 3), np.asarray(palette.convert("RGB")))
    assert_close(decode(encoded(palette, "GIF"), 3), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    wide = (np.arange(256, dtype=np.uint16).reshape(16, 16) << 8) + 255
    assert_close(decode(encoded(Image.fromarray(wide), "PNG"), 1), np.arange(256).reshape(16, 16))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, :2, 3], rgba[:, 2:4, 3], rgba[:, 4:, 3] = 255, 51, 0  # opaque, a fifth, invisible
    wanted = np.full((4, 6, 3), 255, dtype=np.uint8)
    wanted[:, :2] = [200, 0, 0]
    wanted[:, 2:4] = [244, 204, 204]
    assert_close(decode(encoded(Image.fromarray(rgba), "PNG"), 3), wanted, 1)
    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert_close(decode(encoded(grey_alpha, "PNG"), 1)[:, :, 4:].contiguous(), np.full((4, 2), 255))
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
    assert_close(decode(encoded(cmyk, "JPEG", quality=100, subsampling=0), 3), colours(), 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    turned = Image.fromarray(colours()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    options = {} if kind == "PNG" else {"quality": 100}
    found = decode(encoded(turned, kind, exif=exif, **options), 3)
    assert_close(found, colours(), 20)
    unmarked = decode(encoded(turned, kind, **options), 3)
    assert unmarked.shape == (3, 30, 20)  # the control


def test_real_files_have_pillows_pixels(real_data: object) -> None:
    import tarfile

    with tarfile.open(f"{real_data}/cars196_first98.tar", "r|") as tar:
        for member in tar:
            if member.name.endswith("00008.jpg"):
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                break
    assert_close(decode(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_what_cannot_be_decoded_says_why() -> None:
    whole = encoded(Image.fromarray(colours(60, 60)), "JPEG")
    with pytest.raises(ValueError, match="(?i)truncated"):
        decode(whole[: len(whole) // 2], 3)
    with pytest.raises(ValueError, match="format is none of"):
        decode(b"no image at all", 3)
    with pytest.raises(ValueError, match="format is none of"):
        decode(encoded(Image.fromarray(colours()), "EPS"), 3)  # would call another program
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), 3)


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre() -> None:
    image = torch.from_numpy(colours(40, 80)).permute(2, 0, 1)
    found = eval_transform(image, settings(image_size=20, resize=40))
    assert torch.equal(found, image[:, 10:30, 30:50])
    assert eval_transform(image, settings(image_size=16)).shape == (3, 16, 16)
    assert torch.equal(train_transform(image, settings(augment="none"), rng(0)), eval_transform(image, settings()))


@pytest.mark.parametrize("augment", ["crop", "affine"])
def test_a_row_is_a_function_of_its_generator(augment: str) -> None:
    image = torch.from_numpy(colours()).permute(2, 0, 1)
    config = settings(augment=augment)
    first = train_transform(image, config, rng(0, "augment", 1, 2, 3))
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.uint8
    torch.manual_seed(1)  # torch's own randomness plays no part
    assert torch.equal(first, train_transform(image, config, rng(0, "augment", 1, 2, 3)))
    assert not torch.equal(first, train_transform(image, config, rng(0, "augment", 1, 2, 4)))


def test_crop_keeps_the_share_that_was_asked_for_and_flips_half() -> None:
    y, x = np.mgrid[:64, :96]
    image = torch.from_numpy(np.stack([x * 2, y * 3, x * 0]).astype(np.uint8))  # pixels tell where they come from
    flipped, areas = 0, []
    for i in range(300):
        found = train_transform(image, settings(crop_scale=(0.2, 0.5)), rng(i)).float()
        width = float(found[0].max() - found[0].min()) / 2 * 16 / 15
        height = float(found[1].max() - found[1].min()) / 3 * 16 / 15
        areas.append(width * height / (64 * 96))
        flipped += bool(found[0, 0, 0] > found[0, 0, -1])
    assert 0.15 < min(areas) < 0.25
    assert 0.44 < max(areas) < 0.56
    assert 110 < flipped < 190


def test_crop_of_a_very_long_image() -> None:
    assert train_transform(torch.zeros(3, 4, 400, dtype=torch.uint8), settings(), rng(0)).shape == (3, 16, 16)
    assert train_transform(torch.zeros(3, 400, 1, dtype=torch.uint8), settings(), rng(0)).shape == (3, 16, 16)


def test_affine_fills_with_the_background_and_moves_within_its_bounds() -> None:
    config = settings(augment="affine", image_size=32, channels=1)
    blank = torch.full((1, 50, 40), 230, dtype=torch.uint8)
    blank[:, 20:30, 16:24] = 10
    angles, centres = [], []
    for i in range(200):
        found = train_transform(blank, config, rng(i))[0].float()
        assert found[0].eq(230).all()  # a gap would be 0
        ink = (230 - found).numpy()
        y, x = np.mgrid[:32, :32] + 0.5
        cy, cx = (ink * y).sum() / ink.sum(), (ink * x).sum() / ink.sum()
        centres.append((cy, cx))
        angles.append(ink.sum())
    offsets = np.array(centres) - 16
    assert np.abs(offsets).max() < 0.1 * 32 * 1.3
    assert np.abs(offsets).max() > 0.1 * 32 * 0.7
    assert np.abs(offsets.mean(axis=0)).max() < 0.5
    areas = np.array(angles) / np.mean(angles)
    assert 0.75 < areas.min() < 0.9  # scale squared: 0.81 to 1.21
    assert 1.1 < areas.max() < 1.3
    dark = train_transform(255 - blank, config, rng(0))
    assert dark[0, 0].eq(25).all()


def test_affine_is_the_identity_for_a_middling_draw() -> None:
    """A generator whose every uniform(-1, 1) is 0 leaves the square as it is: the matrix has no bias of its own."""

    class Middle:
        def uniform(self, low: float, high: float, size: int) -> np.ndarray:
            return np.full(size, (low + high) / 2)

    image = torch.from_numpy(colours(32, 32)).permute(2, 0, 1)
    found = train_transform(image, settings(augment="affine", image_size=32), Middle())  # type: ignore[arg-type]
    assert (found.int() - image.int()).abs().max() <= 1
