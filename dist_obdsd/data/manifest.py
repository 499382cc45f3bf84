"""The manifest: contents of a folder of shards, in the samples' order (format 1).

``manifest.json`` beside the tars, written last, so that a folder with a manifest is complete::

    {"format": "dist-obdsd shards 1",
     "recipe": {...},             # the recipe as it was resolved, for the record
     "seed": 0,
     "samples_per_class": 2,      # what the blocks of a class were cut for
     "classes": ["a", "b", ...],  # class id -> name
     "splits": {"train": [shard, ...], "test": [shard, ...]}}
    shard = {"file": "train-000000.tar", "bytes": 123, "sha256": "...",
             "ids": [7, ...], "classes": [0, ...], "roles": ["train", ...]}     # in the order of the tar

An id is unique in the whole folder, and the sample's key in the tar is the id as eight digits or more (``key``).
Roles are ``train``; ``both`` for an image that is query and gallery (self-retrieval); ``query``; ``gallery``; and
``gallery:NAME`` where there are several galleries that are searched one by one, such as ``gallery:cam1``.
"""

import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dist_obdsd.config.yaml_file import mistake
from dist_obdsd.data.remote import fetch, is_remote, location, shown
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.files import read_file, readable_name
from dist_obdsd.rng import rng

FORMAT = "dist-obdsd shards 1"
ROLES = ("train", "both", "query", "gallery")
_NAMED_GALLERY = re.compile(r"gallery:([A-Za-z0-9][A-Za-z0-9._-]*)")


def asks(role: str) -> bool:
    """Tell whether an image of this role is a query, as held-out training images are."""
    return role in ("train", "both", "query")


def gallery_of(role: str) -> str | None:
    """Return the gallery of a role: "" for the one without a name, None for none."""
    if role in ("train", "both", "gallery"):
        return ""
    named = _NAMED_GALLERY.fullmatch(role)
    return named and named[1]


def key(sample_id: int) -> str:
    """Return the webdataset key of a sample."""
    return f"{sample_id:08d}"


_Whole = Annotated[int, Field(ge=0, lt=2**63)]
_Name = Annotated[str, BeforeValidator(lambda name: readable_name(name) if isinstance(name, str) else name)]


@dataclass(frozen=True)
class Shard:
    """One tar. The three lists run along its samples, in order."""

    file: str
    bytes: _Whole
    sha256: str
    ids: tuple[_Whole, ...]
    classes: tuple[_Whole, ...]
    roles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Manifest:
    recipe: dict[str, Any]
    seed: int
    samples_per_class: _Whole
    classes: tuple[_Name, ...]
    splits: dict[str, tuple[Shard, ...]]
    digest: str = field(default="", compare=False)
    """SHA-256 of the canonical JSON, by which checkpoints and tracked runs know this data."""

    def images(self, split: str) -> int:
        return sum(len(shard) for shard in self.splits[split])

    def class_ids(self, split: str) -> list[int]:
        """List the classes of a split, ascending."""
        return sorted({c for shard in self.splits[split] for c in shard.classes})

    def shards(self) -> Iterator[Shard]:
        for shards in self.splits.values():
            yield from shards


_MANIFEST = TypeAdapter(Manifest)


def to_json(manifest: Manifest) -> str:
    """Write a manifest as text, one line a shard, always the same for the same data."""
    names = ("recipe", "seed", "samples_per_class", "classes")
    head = {"format": FORMAT} | {name: getattr(manifest, name) for name in names}
    lines = [f" {json.dumps(name)}: {json.dumps(value, sort_keys=True)},\n" for name, value in head.items()]
    splits = []
    for name, shards in manifest.splits.items():
        rows = ",\n".join("   " + json.dumps(asdict(shard)) for shard in shards)
        splits.append(f"  {json.dumps(name)}: [\n{rows}]")
    return "{\n" + "".join(lines) + ' "splits": {\n' + ",\n".join(splits) + "}}\n"


def from_json(text: str, origin: str = "manifest") -> Manifest:
    """Parse and check a manifest.

    Raises:
        InputError: it is not JSON, of another format version, or contradicts itself.
    """
    try:
        raw = json.loads(text)
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise InputError(f"{origin} has format {found!r} but this program reads {FORMAT!r}; pack the data again")
        manifest = _MANIFEST.validate_python(raw | {"digest": hashlib.sha256(text.encode()).hexdigest()})
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"])
        raise InputError(f"{origin}: {mistake(where, item)}; pack the data again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not valid JSON ({error}); pack the data again") from error
    _check(manifest, origin)
    return manifest


def _check(manifest: Manifest, origin: str) -> None:
    for shard in manifest.shards():
        where = f"{origin}: shard {shard.file}"
        if not len(shard.ids) == len(shard.classes) == len(shard.roles):
            raise InputError(
                f"{where} lists {len(shard.ids)} ids, {len(shard.classes)} classes and {len(shard.roles)} roles; they "
                f"must be equally many"
            )
        if Path(shard.file).is_absolute() or ".." in Path(shard.file).parts:
            raise InputError(f"{where} lies outside the folder; name files inside it")
        if unknown := {role for role in set(shard.roles) if not asks(role) and gallery_of(role) is None}:
            raise InputError(
                f"{where} has the role {min(unknown)!r}; roles are {', '.join(ROLES)} and gallery:NAME with a name of "
                f"letters, digits, '.', '_' and '-'"
            )
        if max(shard.classes, default=-1) >= len(manifest.classes):
            raise InputError(f"{where} has class id {max(shard.classes)} but {len(manifest.classes)} classes are named")
    ids = [i for shard in manifest.shards() for i in shard.ids]
    if len(set(ids)) != len(ids):
        raise InputError(
            f"{origin}: {len(ids)} samples have only {len(set(ids))} different ids; every id must be unique"
        )
    train = set(manifest.class_ids("train")) if "train" in manifest.splits else set()
    for split in manifest.splits.keys() - {"train"}:
        if both := train & set(manifest.class_ids(split)):
            raise InputError(
                f"{origin}: class {manifest.classes[min(both)]!r} is in train and in {split}; retrieval is measured on "
                f"classes never seen, so a class must stand on one side"
            )


def load(root: str | Path) -> Manifest:
    """Read the manifest of a folder, or of a URL or ``pipe:`` command.

    Raises:
        InputError: the folder or the manifest is missing or cannot be downloaded, or the manifest is not sound.
    """
    root = expanduser(root)
    path = location(root, "manifest.json")
    try:
        if is_remote(root):
            stream = io.BytesIO()
            fetch(path, stream)
            data = stream.getvalue()
        elif Path(root).is_dir():
            data = read_file(path)
        else:
            how = f"`dist-obdsd pack RECIPE --source IMAGES --out {root}`"
            raise InputError(f"there is no shard folder {root}; make one with {how}")
        return from_json(data.decode(), shown(path))
    except RunError as error:  # before anything ran: most likely the address is wrong
        raise InputError(str(error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read {path}: {reason}; check the path, or pack the data again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is not text ({error}); pack the data again") from error


def split_classes(
    manifest: Manifest, seed: int, *, fraction: float = 0.0, classes: Sequence[str] = (), folds: int | None = None,
    fold: int = 0,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Cut the training classes into those to train on and those to validate on.

    Held out are the named ``classes``, or one ``fold`` of near-equal ``folds``, or a ``fraction``; the seed chooses.

    Returns:
        (training class ids, validation class ids), both ascending.

    Raises:
        InputError: a class to hold out is not there, a side has fewer than two classes, or nothing is to train on.
    """
    if "train" not in manifest.splits:
        raise InputError(f"these shards have only {', '.join(manifest.splits)}; training needs a train split")
    known = manifest.class_ids("train")
    if classes:
        ids = {manifest.classes[c]: c for c in known}
        for name in classes:
            if name not in ids:
                near = difflib.get_close_matches(name, ids, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"validation.classes holds {name!r}, which is no training class of these shards{hint}")
        chosen, what = sorted({ids[name] for name in classes}), "validation.classes"
    elif folds is not None:
        if len(known) // folds < 2:
            raise InputError(
                f"validation.folds={folds} of {len(known)} classes leaves a fold with less than two; "
                f"set it to {len(known) // 2} or less, or pack more classes"
            )
        order = rng(seed, "validation folds").permutation(np.array(known))
        chosen, what = np.array_split(order, folds)[fold].tolist(), f"fold {fold} of validation.folds={folds}"
    else:
        order = rng(seed, "validation classes").permutation(np.array(known))
        chosen, what = order[: round(fraction * len(known))].tolist(), f"validation.fraction={fraction}"
    if (fraction or classes or folds) and not 2 <= len(chosen) <= len(known) - 2:
        raise InputError(
            f"{what} holds out {len(chosen)} of {len(known)} classes; both sides need at least two classes"
        )
    return sorted(set(known) - set(chosen)), sorted(chosen)
