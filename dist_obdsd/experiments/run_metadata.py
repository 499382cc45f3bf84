"""Under what conditions the runs of a comparison were made: what a reader needs to judge their numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_obdsd.config import SELECTION_METRIC, Config
from dist_obdsd.data.manifest import Manifest, asks, gallery_of
from dist_obdsd.experiments.run_status import Outcome


def conditions(outcomes: Sequence[Outcome], shards: Mapping[str, Manifest]) -> dict[str, str]:
    """Name -> value; where arms differ, every value with the arms that have it."""

    def by(settings: Callable[[Config], Any]) -> str:
        return _values([(outcome.child.label, str(settings(outcome.child.settings))) for outcome in outcomes])

    def of(*names: str) -> str:
        report_failure = [" ".join(str(o.provenance.get(name, "not recorded")) for name in names) for o in outcomes]
        return _values([(outcome.child.label, text) for outcome, text in zip(outcomes, report_failure, strict=True)])

    seeds = sorted({outcome.child.seed for outcome in outcomes})
    held_out = _values([(o.child.label, str(o.summary["meta"].get("validation_classes", "unknown"))) for o in outcomes])
    return {
        "dataset": by(lambda c: _dataset(shards[c.data.shards])),
        "manifest": by(lambda c: shards[c.data.shards].digest),
        "test protocol": by(lambda c: _test(shards[c.data.shards], c)),
        "model selection": by(_selection) + f" (validation classes: {held_out})",
        "seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "backbone": by(lambda c: f"{c.model.backbone}, {c.model.embedding_dim} dimensions, {c.model.pooling} pooling"),
        "pretraining data": by(_pretraining),
        "images": by(lambda c: f"{c.data.image_size} x {c.data.image_size}, {c.data.channels} channels, "
                               f"augmentation {c.data.augment}"),
        "batch": by(lambda c: f"{c.batch.global_size} images, {c.batch.samples_per_class} per class"),
        "epochs": by(lambda c: f"{c.epochs}" + (f", stopped after {c.max_steps} steps" if c.max_steps else "")),
        "ranking loss": by(lambda c: c.ranking.name),
        "optimizer": by(lambda c: f"{c.optim.name}, learning rate {c.optim.lr:g} ({c.optim.schedule}), "
                                  f"weight decay {c.optim.weight_decay:g}"),
        "evaluation": by(lambda c: f"{c.evaluation.distance} distance, {c.evaluation.conventions} conventions"),
        "precision": by(lambda c: c.precision),
        "ranks": of("world_size"),
        "hardware": of("hardware"),
        "git commit": _values([(o.child.label, _commit(o.provenance)) for o in outcomes]),
        "versions": _values([
            (o.child.label, ", ".join(f"{name[8:]} {value}" for name, value in o.provenance.items()
                                      if name.startswith("version.")))
            for o in outcomes
        ]),
    }  # fmt: skip


def _values(pairs: Sequence[tuple[str, str]]) -> str:
    """The one value that all have, or each with the arms that have it."""
    owners: dict[str, dict[str, None]] = {}
    for label, value in pairs:
        owners.setdefault(value, {})[label] = None
    if len(owners) == 1:
        return next(iter(owners))
    return "; ".join(f"{', '.join(labels)}: {value}" for value, labels in owners.items())


def _commit(provenance: Mapping[str, Any]) -> str:
    commit = str(provenance.get("git_commit", "not recorded"))
    return commit + " with uncommitted changes" * (provenance.get("git_dirty") == "true")


def _dataset(manifest: Manifest) -> str:
    counts = [
        f"{split} {manifest.images(split):,} images of {len(manifest.class_ids(split)):,} classes"
        for split in manifest.splits
    ]
    return f"{manifest.recipe.get('name', 'unknown')}: {', '.join(counts)}"


def _test(manifest: Manifest, settings: Config) -> str:
    if not settings.evaluation.test or "test" not in manifest.splits:
        return "the test set was not looked at"
    roles = [role for shard in manifest.splits["test"] for role in shard.roles]
    queries, galleries = sum(map(asks, roles)), sorted({g for r in roles if (g := gallery_of(r)) is not None})
    if set(roles) == {"both"}:
        return f"self-retrieval of {queries:,} images of classes never trained on"
    named = f" ({', '.join(galleries)})" if any(galleries) else ""
    images = sum(gallery_of(role) is not None for role in roles)
    return f"{queries:,} queries against a gallery of {images:,} images{named}, classes never trained on"


def _selection(settings: Config) -> str:
    if settings.validation.holds_out:
        chosen = f"the epoch, by {SELECTION_METRIC} on training classes held out for it"
    else:
        chosen = "none: no classes are held out, the last epoch is reported"
    return chosen + ("; best_test chooses on the test set" if settings.evaluation.best_test else "")


def _pretraining(settings: Config) -> str:
    known = {"none": "none (random initialization)", "torchvision": "ImageNet-1k (torchvision's weights)"}
    return known.get(settings.model.pretrained, f"what the weights in {settings.model.pretrained} were trained on")
