"""Checkpoint files: one file with all that affects the next step (format 1).

``checkpoints/epoch-0003.pt`` (or ``step-00001234.pt`` inside an epoch) is a ``torch.save`` of plain containers and
tensors, loaded with ``weights_only=True``, so that loading never executes anything::

    {"format": "dist-obdsd checkpoint 1",
     "config": {...}, "manifest": sha256, "validation_classes": [...],
     "student": state dict, "teacher": {"network": state dict, "epoch": n} or None,
     "optimizer": {parameter name: {state}},             # no groups, no order: any strategy can read it
     "objective": {}, "objective_optimizer": {}, "manifold_memory": None, "scaler": None,
     "position": {"epoch": e, "step": s, "global_step": n},   # the next step to take
     "pending_validation": whether the epoch before it is still to be validated,   # older files: "unjudged", or absent
     "best_validation": {"value": v, "epoch": e} or None, "untrained": {metric: value} or None,
     "best_test", "last_test": {"value": v, "epoch": e, "metrics": {metric: value}} or None,   # absent in older files
     "tracker": run id or None}

``last`` and ``best`` are one-line text files that hold a checkpoint's name. Every file is written under a temporary
name, flushed to the disk and renamed, so that a name always stands for a whole file.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dist_obdsd.errors import InputError, RunError, format_error
from dist_obdsd.files import replacing, why_not_written, write_atomically

FORMAT = "dist-obdsd checkpoint 1"
UNREADABLE = {
    zipfile.BadZipFile: "it is cut short or another kind of file (plain weights serve as model.pretrained of a config)",
    pickle.UnpicklingError: "it holds more than tensors and plain containers, which would have to be executed",
}
ENTRIES = frozenset(
    """format config manifest validation_classes student teacher optimizer objective objective_optimizer
    manifold_memory scaler position best_validation untrained tracker""".split()  # noqa: SIM905
)


def save(folder: Path, state: dict[str, Any], *, best: bool, keep: int) -> Path:
    """Write one checkpoint, move the pointers and prune old files, on one rank.

    Args:
        state: the entries listed above, without ``format``.
        best: whether this one is the best by validation so far.
        keep: how many are kept besides those that a pointer names.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    position = state["position"]
    name = f"epoch-{position['epoch']:04d}.pt" if position["step"] == 0 else f"step-{position['global_step']:08d}.pt"
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".*.writing"):  # of a run that was killed while it wrote
            unfinished.unlink()
        with replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        # torch hides a full disk behind a complaint about its own file format.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = str(error).splitlines()[0]
        if isinstance(cause, OSError):
            needed = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
            reason = why_not_written(cause, folder if folder.exists() else folder.parent, needed)
        before = "the previous one is intact" if (folder / "last").exists() else "there is none before it"
        raise RunError(
            f"cannot write the checkpoint {path}: {reason}; {before}, so free some space "
            f"and start the same command again"
        ) from error
    if best:  # first: what `last` names says that the best one is in place
        write_atomically(folder / "best", name.encode())
    write_atomically(folder / "last", name.encode())
    pointed = {pointer.read_text().strip() for pointer in (folder / "last", folder / "best") if pointer.exists()}
    files = sorted(folder.glob("*.pt"), key=lambda file: file.stat().st_mtime_ns)
    for old in [file for file in files if file.name not in pointed][: -keep if keep else None]:
        old.unlink()
    return path


def find(path: Path, which: str = "last") -> Path | None:
    """Find a path's checkpoint: a file, a run folder, its checkpoints, or a pointer.

    Args:
        which: the pointer to follow in a folder, ``last`` or ``best``.

    Raises:
        InputError: a pointer names a file that is missing.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / which).is_file():
            path = folder / which
    if path.is_file() and path.name in ("last", "best"):
        pointer, path = path, path.parent / path.read_text().strip()
        if not path.is_file():
            raise InputError(f"{pointer} names {path.name}, which is missing; write another checkpoint's name into it")
    return path if path.is_file() else None


def pointers(folder: Path) -> dict[str, str]:
    """Describe the files that ``last`` and ``best`` name, as tags for a tracker."""
    found = {name: find(folder / name) for name in ("last", "best")}
    return {f"checkpoint.{n}": f"{p.absolute()} ({p.stat().st_size} bytes)" for n, p in found.items() if p is not None}


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        InputError: there is none, it is truncated, or it is not one of ours.
    """
    found = find(path)
    if found is None:
        raise InputError(f"there is no checkpoint at {path}; give a .pt file or a run folder")
    try:
        with zipfile.ZipFile(found) as archive:
            # torch does not look at the checksums that it writes, so to it a damaged weight is a weight like any other.
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{damaged} in it is damaged")
        state = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = UNREADABLE.get(type(error), format_error(error))
        raise InputError(
            f"{found} is not a readable checkpoint: {reason}; take an earlier one from the same folder by writing its "
            f"name into {found.parent / 'last'}"
        ) from error
    version = state.get("format") if isinstance(state, dict) else None
    if version is None and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(state)):
        raise InputError(
            f"{found} holds plain weights, not a run's checkpoint; train from them with model.pretrained={found} in a "
            f"config, then give the run's folder"
        )
    if version != FORMAT:
        raise InputError(f"{found} has format {version!r} but this program reads {FORMAT!r}; give a run folder")
    missing = ENTRIES - state.keys()
    if missing:
        raise InputError(f"{found} lacks {', '.join(sorted(missing))}; it was not written by this program")
    state.setdefault("pending_validation", state.pop("unjudged", False))
    return state
