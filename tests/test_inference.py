"""``dist_obdsd.load`` beside ``embed`` on the command line, and every kind of image beside every other."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dist_obdsd
from dist_obdsd.cli.main import main
from dist_obdsd.config import parse_config
from dist_obdsd.errors import InputError
from dist_obdsd.inference import ImageEmbedder
from dist_obdsd.models.embedder import build_embedder
from tests.data.pictures import colours


@pytest.fixture(scope="module")
def embedder(trained):
    return dist_obdsd.load(trained / "runs" / "tiny")


@pytest.fixture(scope="module")
def coloured():
    """An untrained network for RGB, with a resize before the crop."""
    data = {"shards": "none", "image_size": 24, "resize": 32}
    config = parse_config({"name": "rgb", "epochs": 2, "data": data, "model": {"backbone": "small_cnn"}}, "test")
    network = build_embedder(config, torch.device("cpu")).eval()
    return ImageEmbedder(network, config, 2, Path("none"))


def test_rows_are_those_of_embed(trained, embedder, tmp_path):
    out = tmp_path / "rows.npz"
    assert main(["embed", f"{trained}/runs/tiny", "--images", f"{trained}/images", "--out", str(out)]) == 0
    with np.load(out) as archive:
        wanted, keys = archive["embeddings"], archive["keys"]
    rows = embedder(trained / "images" / key for key in keys)
    assert rows.shape == (192, embedder.dim) == (192, 16)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    np.testing.assert_allclose(rows.numpy(), wanted, atol=1e-6)
    # Different images differ, so the rows stand in the images' order.
    assert np.abs(wanted - np.roll(wanted, 1, axis=0)).max(axis=1).min() > 1e-3
    one = embedder(str(trained / "images" / keys[7]))
    np.testing.assert_allclose(one.numpy(), wanted[7:8], atol=1e-6)


@pytest.mark.parametrize("which", ["last", "best"])
def test_which_chooses_the_pointer(trained, which):
    embedder = dist_obdsd.load(trained / "runs" / "tiny", which=which)
    assert embedder.path.name == (trained / "runs" / "tiny" / "checkpoints" / which).read_text()
    state = torch.load(embedder.path, weights_only=True)["student"]
    assert all(torch.equal(value, state[name]) for name, value in embedder.network.state_dict().items())


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_gives_the_same_row(channels, embedder, coloured, tmp_path):
    array = colours(40, 50)
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    image.save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        path, str(path), path.read_bytes(), image, Image.open(path), array, array / 255, tensor, tensor / 255,
        tensor.double() / 255, (tensor / 255).requires_grad_(), np.asfortranarray(array),
    ]  # fmt: skip
    embed = embedder if channels == 1 else coloured
    wanted = embed.prepare(path)
    for kind in kinds:
        assert torch.equal(embed.prepare(kind), wanted)
    rows = embed(kinds)
    assert rows.shape == (len(kinds), embed.dim)
    assert embed([]).shape == (0, embed.dim)
    for same in (rows, embed(torch.stack([tensor] * 3)), embed(np.stack([array] * 2))):  # batches in one piece
        assert (same - embed(path)).abs().max() < 1e-6
    assert (embed(255 - array) - rows[0]).abs().max() > 1e-3


def test_grey_pixels_are_read_by_a_network_for_colours(coloured):
    grey = colours(40, 50)[:, :, 0]
    kinds = [Image.fromarray(grey), grey, grey[:, :, None], torch.tensor(grey), torch.tensor(grey)[None]]
    kinds += [Image.fromarray(grey).convert("RGB"), np.stack([grey] * 3, axis=-1)]
    for kind in kinds:
        assert torch.equal(coloured.prepare(kind), coloured.prepare(kinds[0]))


def test_orientation_and_alpha_are_read_as_in_training(coloured, tmp_path):
    array = colours(40, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(array)).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    upright = coloured.prepare(array)
    assert torch.equal(coloured.prepare(turned), upright)
    assert turned.getexif()[0x0112] == 6  # the caller's image is left as it was
    assert torch.equal(coloured.prepare(tmp_path / "turned.png"), upright)
    clear = np.dstack([array, np.zeros(array.shape[:2], np.uint8)])
    assert (coloured.prepare(Image.fromarray(clear)) == 255).all()


REFUSED = [
    (7, "of type int"),
    (io.BytesIO(b"x\ny"), "of type BytesIO"),
    (b"nothing", "its format is none of"),
    (np.zeros((4, 5, 4), np.uint8), r"shape \[4, 5, 4\]; .* an array \[H, W\] or \[H, W, C\]"),
    (torch.zeros(4, 5, 5), r"shape \[4, 5, 5\]; a tensor must be \[H, W\] or \[C, H, W\]"),
    (torch.full((3, 4, 4), 1.5), "from 1.5 to 1.5 but must be from 0 to 1"),
    (torch.full((3, 4, 4), torch.nan), "must be from 0 to 1"),
    (torch.zeros(3, 4, 4, dtype=torch.int64), "type torch.int64"),
    (np.zeros((4, 4), dtype=object), "type object"),
]


@pytest.mark.parametrize(("image", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_no_image_is_refused_with_its_number_and_the_reason(embedder, image, words):
    with pytest.raises(InputError, match=f"image 1 cannot be embedded: .*{words}"):
        embedder([colours(), image])


@pytest.mark.parametrize(
    ("file", "words"),
    [("no.png", "its format is none of"), ("cut.png", ""), ("missing.png", "No such"), (".", "Is a dir")],
)
def test_a_broken_file_is_named(trained, embedder, tmp_path, file, words):
    good = trained / "images" / "class_00" / "0.png"
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{tmp_path / file} cannot be embedded: {words}"):
        embedder([good, tmp_path / file])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"which": "best"}, "has no best checkpoint"),
        ({"which": "newest"}, "which is 'newest'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_run_without_a_best_epoch_is_loaded_as_last(trained, tmp_path, arguments, words):
    run = trained / "runs" / "tiny" / "checkpoints"
    (tmp_path / "checkpoints").mkdir()
    for file in ("last", (run / "last").read_text()):
        shutil.copy(run / file, tmp_path / "checkpoints")
    assert dist_obdsd.load(tmp_path).path.parent == tmp_path / "checkpoints"
    with pytest.raises(InputError, match=words):
        dist_obdsd.load(tmp_path, **arguments)
