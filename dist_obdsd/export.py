"""A checkpoint's network as files for other programs: ``torch.export`` and ONNX.

The exported network is in float32, takes uint8 images in batches of any size and normalises them itself. A folder of
exports holds ``model.pt2``, ``model.onnx``, ``preprocessing.json`` (the steps before the network, and what was
verified) and ``README.md`` (those steps as a program); both model files carry the preprocessing, too. The folder
appears only after every model file was read back and gave the checkpoint's own embeddings on real images.

Legend: n images, C channels, s side, D embedding dimension.
"""

import copy
import hashlib
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_obdsd import __version__
from dist_obdsd.data.images import FORMATS
from dist_obdsd.data.transforms import LONGEST
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.files import new_folder
from dist_obdsd.inference import ImageEmbedder, load

FORMAT = "dist-obdsd export 1"
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5
"""Largest difference to the checkpoint in any number of an embedding; float32 rounds to about 1e-7."""
BATCHES = (1, 2, 3, 5, 8, 13, 32)
"""Sizes of the batches that are verified, one after the other."""
IMAGES = sum(BATCHES)


def check_request(formats: Sequence[str], out: Path) -> None:
    """Raise InputError if a format, a package or ``out`` does not serve."""
    unknown = [name for name in formats if name not in FILES]
    if unknown:
        raise InputError(f"--format {','.join(formats)} is unknown; give {' or '.join(FILES)}, or both with a comma")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise InputError(
            f"--format onnx needs {', '.join(missing)}; pip install 'dist-obdsd[export]', or give --format torch"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "preprocessing.json").is_file():
        raise InputError(f"{out} holds other files; choose an --out that is new, empty or an earlier export")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder for --out")


def export(path: Path, out: Path, formats: Sequence[str], images: Sequence[Any], source: str) -> dict[str, float]:
    """Write a folder of exports, whole or not at all, in place of an earlier one.

    Args:
        path: a run folder or a checkpoint file.
        formats: of ``FILES``.
        images: to verify with, as ``ImageEmbedder`` takes them; few are used several times.
        source: where the images are from, for ``preprocessing.json``.

    Returns:
        The largest difference to the checkpoint's embeddings, by format.

    Raises:
        InputError: as in ``check_request``; there is no checkpoint, an image is broken, or ``out`` cannot be written.
        RunError: a file's embeddings are not the checkpoint's.
    """
    check_request(formats, out)
    embedder = load(path, device="cpu")
    images_nCss = torch.stack([embedder.prepare(image) for image in images])
    images_nCss = images_nCss[torch.arange(IMAGES) % len(images)]
    expected_nD = embedder.embed_prepared(images_nCss)
    about = preprocessing(embedder)
    # Two images, since a batch of one would be taken for a constant.
    network, dynamic = copy.deepcopy(embedder.network).float(), {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(network, (images_nCss[:2],), dynamic_shapes=(dynamic,))
    largest = {}
    try:
        with new_folder(out.resolve()) as folder:  # "." has no name
            for name in formats:
                read_back = _WRITERS[name](program, folder / FILES[name], json.dumps(about))
                largest[name] = verify(name, read_back, images_nCss, expected_nD)
            verified = {"images": len(images), "source": source, "batch_sizes": BATCHES, "largest_difference": largest}
            (folder / "preprocessing.json").write_text(json.dumps(about | {"verified": verified}, indent=1) + "\n")
            shutil.copyfile(Path(__file__).with_name("export_readme.md"), folder / "README.md")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    return largest


def preprocessing(embedder: ImageEmbedder) -> dict[str, Any]:
    """Describe the way from an image file to its embedding, as plain data."""
    data = embedder.config.data
    channels = "RGB" if data.channels == 3 else "grey"
    rows, columns = data.size
    side = rows if rows == columns else [rows, columns]
    resize: dict[str, Any] = {"shorter_side": data.resize or min(rows, columns)} if data.fit == "crop" else {}
    with embedder.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": FORMAT,
        "version": __version__,
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", data.channels, rows, columns]},
        "output": {"name": "embeddings", "dtype": "float32", "shape": ["batch", embedder.dim], "unit_length": True},
        "decode": {"channels": channels, "formats": FORMATS,
                   "orientation": "as EXIF says" if data.exif else "as stored",
                   "alpha": "on white", "frame": "the first", "16_bit": "the upper 8"},
        "max_aspect_ratio": LONGEST,
        "fit": data.fit,
        "resize": resize | {"interpolation": "bilinear", "antialias": True},
        "crop": {"size": side, "where": "centre"},
        # The network does this itself: (pixel / 255 - mean) / std.
        "normalisation": {"inside_the_network": True, "scale": 1 / 255, "mean": data.mean, "std": data.std},
        "checkpoint": {"file": embedder.path.name, "sha256": digest},
    }  # fmt: skip


def verify(name: str, run: Callable[[Tensor], Tensor], images_nCss: Tensor, expected_nD: Tensor) -> float:
    """Return the largest difference to the checkpoint, a RunError above TOLERANCE."""
    largest = 0.0
    for batch_bCss, wanted_bD in zip(images_nCss.split(BATCHES), expected_nD.split(BATCHES), strict=True):
        rows_bD = run(batch_bCss)
        if rows_bD.shape != wanted_bD.shape:
            raise RunError(f"the {name} export gives shape {[*rows_bD.shape]}, the checkpoint {[*wanted_bD.shape]}")
        difference = (rows_bD - wanted_bD).abs().max().item()
        if not difference <= TOLERANCE:
            raise RunError(
                f"the {name} export differs from the checkpoint by {difference:.2g} in a batch of {len(batch_bCss)}, "
                f"above the {TOLERANCE:g} that is allowed, so nothing was written; try another version of torch or of "
                f"{' and '.join(ONNX_PACKAGES)}"
            )
        largest = max(largest, difference)
    return largest


# ---- writing a file and reading it back ----


def _torch(program: torch.export.ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        # Of weights that are views of one storage: torch writes all of it, and what is read back is verified.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, path, extra_files={"preprocessing.json": about})
    return torch.export.load(path).module()


def _onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making; nobody could act on them
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["embeddings"],
            dynamic_shapes=({0: "batch"},), verbose=False,
        )  # fmt: skip
    assert made is not None
    made.model.metadata_props["preprocessing"] = about
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_bCss: torch.from_numpy(session.run(["embeddings"], {"images": images_bCss.numpy()})[0])


_WRITERS = {"torch": _torch, "onnx": _onnx}
