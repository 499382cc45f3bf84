"""Who is measured: what an evaluation needs of a manifest, known before anything is embedded. Pure."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dist_obdsd.config import Config
from dist_obdsd.data.manifest import Manifest, asks, gallery_of
from dist_obdsd.errors import InputError
from dist_obdsd.rng import rng


def validation_subset(manifest: Manifest, classes: Sequence[int], config: Config) -> list[int]:
    """The validation classes that ``validation.max_images`` leaves room for, ascending.

    Classes are taken whole, in an order that the seed gives, as long as they fit; what does not fit is passed over.

    Raises:
        InputError: fewer than two classes fit.
    """
    limit = config.validation.max_images
    if limit is None or not classes:
        return sorted(classes)
    sizes = Counter(label for shard in manifest.splits["train"] for label in shard.classes)
    taken: list[int] = []
    for label in rng(config.seed, "validation images").permutation(np.array(sorted(classes))).tolist():
        if sizes[label] <= limit:
            taken.append(label)
            limit -= sizes[label]
    if len(taken) < 2:
        raise InputError(
            f"validation.max_images={config.validation.max_images} has room for {len(taken)} whole classes and needs "
            f"room for 2; set it to {sum(sorted(sizes[label] for label in classes)[-2:])} or more"
        )
    return sorted(taken)


def check_evaluable(manifest: Manifest, config: Config, validation_classes: Sequence[int]) -> None:
    """Find out before training what an evaluation after it would refuse.

    Raises:
        InputError: the test split or the validation classes have no two images of one class, or fewer images than the
            longest Recall@k looks at.
    """
    parts = [("validation", "train", set(validation_classes))] if validation_classes else []
    if config.evaluation.test and "test" in manifest.splits:
        parts.append(("test", "test", set(manifest.class_ids("test"))))
    for name, split, classes in parts:
        images = [
            (label, role)
            for shard in manifest.splits[split]
            for label, role in zip(shard.classes, shard.roles, strict=True)
            if label in classes
        ]
        for gallery in sorted({of for _, role in images if (of := gallery_of(role)) is not None}) or [""]:
            _check_gallery(images, gallery, f"{name} images" + (gallery and f" (gallery {gallery})"), config)


def _check_gallery(images: Sequence[tuple[int, str]], gallery: str, name: str, config: Config) -> None:
    """``check_evaluable`` for one gallery of (class, role) images."""
    offered = Counter(label for label, role in images if gallery_of(role) == gallery)
    # What a query can find: of its class, and in all. It never finds itself.
    matches = [offered[label] - (gallery_of(role) == gallery) for label, role in images if asks(role)]
    others = sum(offered.values()) - any(asks(role) and gallery_of(role) == gallery for _, role in images)
    if not any(matches):
        raise InputError(f"no query of the {name} has another image of its class to find; add images")
    longest = max(config.evaluation.recall_at) if "recall" in config.evaluation.metrics else 1
    if others < longest:
        raise InputError(
            f"evaluation.recall_at asks for {longest} neighbours but a query of the {name} has {others} others; set "
            f"evaluation.recall_at to smaller numbers, or add images"
        )
