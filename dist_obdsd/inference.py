"""A trained network for images in any form: images in, embeddings out."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_obdsd import checkpoint
from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.data.images import decode, pixels, upright
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.distributed.launch import Launch, choose_device
from dist_obdsd.errors import InputError, require
from dist_obdsd.files import read_file
from dist_obdsd.models.embedder import Embedder, build_embedder

WANTED = "give a path, encoded bytes, a Pillow image, a tensor [C, H, W], an array [H, W, C], or a list of them"
SHAPES = "a tensor must be [H, W] or [C, H, W], an array [H, W] or [H, W, C], with C 1 or 3"


def load(
    path: str | Path,
    *,
    which: Literal["last", "best"] = "last",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 32,
) -> "ImageEmbedder":
    """Load a trained network.

    >>> embedder = load("runs/photos")
    >>> rows = embedder(["a.png", "b.png"])  # float32 [2, D], of unit length
    >>> cosine = rows[0] @ rows[1]

    Args:
        path: a run folder or a checkpoint file.
        which: of a run folder's checkpoints; ``best`` is the best by validation.
        device: ``auto`` takes a GPU where there is one.
        batch_size: images that go through the network at a time.

    Raises:
        InputError: there is no such checkpoint, or no such device.
    """
    require("which", which, which in ("last", "best"), "last or best")
    require("device", device, device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    require("batch_size", batch_size, batch_size > 0, "at least 1")
    path = checkpoint.find(Path(path), which) or Path(path)
    if path.is_dir() and checkpoint.find(path) is not None:
        raise InputError(
            f"{path} has no best checkpoint: no classes were held out (validation.fraction), or it ended before the "
            f"first validation; take 'last'"
        )
    state = checkpoint.load(path)
    config = inference_config(state)
    chosen = choose_device(device, Launch("single"), torch.cuda.device_count())
    return ImageEmbedder(build_network(state, config, chosen, path), config, batch_size, path)


def inference_config(state: dict[str, Any], overrides: Sequence[str] = (), shards: str = "none") -> Config:
    """Return a checkpoint's config for other images, with overrides ``a.b=c``.

    Args:
        state: a checkpoint's content; its ``config`` is changed.
        shards: the shards of those images, if they are packed.

    Raises:
        InputError: a setting is unknown or impossible.
    """
    raw = state["config"]
    raw["data"]["shards"] = shards
    raw["data"].pop("sampling", None)  # of training only; it may be one that has gone
    # The checkpoint's own weights replace any that the backbone was started from.
    raw["model"]["pretrained"] = "none"
    raw["deepspeed"] = {}  # an earlier version took stage 0
    if raw["model"]["norm"] == "sync":  # which needs GPUs, and differs from frozen in training only
        raw["model"]["norm"] = "frozen"
    return parse_config(override_config(raw, overrides), "the checkpoint")


def build_network(
    state: dict[str, Any], config: Config, device: torch.device, path: Path, overrides: Sequence[str] = ()
) -> Embedder:
    """Build a checkpoint's network in evaluation mode, or raise InputError.

    The weights may not fit the config, which ``overrides`` may have changed.
    """
    network = build_embedder(config, device)
    try:
        network.load_state_dict(state["student"])
    except RuntimeError as error:
        source = f"the settings {', '.join(overrides)}" if overrides else "its own settings"
        raise InputError(f"{path} does not fit {source}; leave model.* and data.channels as in training") from error
    return network.eval()


class ImageEmbedder:
    """An embedder of images in any form, made by ``load``."""

    def __init__(self, network: Embedder, config: Config, batch_size: int, path: Path) -> None:
        """``path`` is the checkpoint file that the network is from."""
        self.network, self.config, self.batch_size, self.path = network, config, batch_size, path
        self.device = network.mean.device

    @property
    def dim(self) -> int:
        """The embedding dimension D."""
        return self.config.model.embedding_dim

    def __call__(self, images: Any) -> Tensor:
        """Embed one image or many; see ``prepare`` for what may be given.

        Returns:
            float32 [n, D] on the CPU, rows of length 1 in the order of the images; n is 1 for a single image.

        Raises:
            InputError: an image cannot be read; the message says which one.
        """
        rows = [torch.empty(0, self.dim)]
        numbered = enumerate(_as_list(images))
        while batch := list(islice(numbered, self.batch_size)):
            rows.append(self.embed_prepared(torch.stack([self.prepare(image, f"image {i}") for i, image in batch])))
        return torch.cat(rows)

    def embed_prepared(self, images_nCss: Tensor) -> Tensor:
        """Embed images that ``prepare`` made, in one batch."""
        with torch.no_grad():
            return self.network(images_nCss.to(self.device)).float().cpu()

    def prepare(self, image: Any, name: str = "the image") -> Tensor:
        """Decode, resize and crop one image as the evaluation does.

        Args:
            image: the path of an image file; the bytes of one; a Pillow image; a tensor [H, W] or [C, H, W], uint8 or
                floating point from 0 to 1 and not normalised; or an array [H, W] or [H, W, C] of such numbers. C is 1
                or 3; grey becomes RGB and RGB grey where the network wants it.
            name: in the error, of an image that is no path.

        Returns:
            uint8 [C, s, s].

        Raises:
            InputError: it is none of these, or cannot be decoded.
        """
        data = self.config.data
        try:
            return eval_transform(_decode(image, data.channels, data.exif), data)
        except (ValueError, OSError) as error:
            name = str(image) if isinstance(image, str | Path) else name
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise InputError(f"{name} cannot be embedded: {reason}") from error


def _as_list(images: Any) -> Iterable[Any]:
    """Make a list of one image; split a batch into its rows."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable) or hasattr(images, "read"):  # an open file's lines are no images
        raise InputError(f"an image of type {type(images).__name__} cannot be embedded; {WANTED}")
    return images


def _decode(image: Any, channels: int, exif: bool) -> Tensor:
    """Return uint8 [channels, H, W]."""
    if isinstance(image, str | Path):
        image = read_file(image)
    if isinstance(image, bytes):
        return decode(image, channels, exif)
    if isinstance(image, Image.Image):
        try:
            return pixels(upright(image, exif), channels)
        except Exception as error:  # Pillow may read the file only now, and raises nearly anything on a broken one
            raise ValueError(str(error) or type(error).__name__) from error
    if isinstance(image, Tensor):
        planes = image.detach().cpu()
    elif isinstance(image, np.ndarray) and image.dtype.kind in "uif":
        planes = torch.from_numpy(np.array(image))  # a copy, since torch wants arrays that may be written to
        planes = planes.movedim(-1, 0) if image.ndim == 3 else planes
    else:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"it is of type {kind}; {WANTED}")
    planes = planes[None] if planes.ndim == 2 else planes
    if planes.ndim != 3 or planes.shape[0] not in (1, 3) or 0 in planes.shape:
        raise ValueError(f"it has shape {list(image.shape)}; {SHAPES}")
    planes = _as_bytes(planes)
    if len(planes) == channels:
        return planes
    return planes.expand(3, -1, -1) if channels == 3 else pixels(Image.fromarray(planes.movedim(0, -1).numpy()), 1)


def _as_bytes(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"its pixels are of type {image.dtype}; they must be uint8, or floating point from 0 to 1")
    if not ((image >= 0) & (image <= 1)).all().item():
        raise ValueError(
            f"its floating-point pixels are from {image.min():.3g} to {image.max():.3g} but must be from 0 to 1; "
            f"do not normalise them, the network does"
        )
    # In float32, where half precision would be off by more than a step.
    return (image.float() * 255).round().to(torch.uint8)
