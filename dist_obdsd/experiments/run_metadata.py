"""Conditions of a comparison's runs, which a reader needs to judge their numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_obdsd.config import Config
from dist_obdsd.config.sections import SELECTION_METRIC
from dist_obdsd.data.manifest import Manifest, asks, gallery_of
from dist_obdsd.experiments.run_status import RunStatus


def run_metadata(runs: Sequence[RunStatus], shards: Mapping[str, Manifest]) -> dict[str, str]:
    """Describe data, settings, machines and versions, by variant where these differ."""

    def of_run(describe: Callable[[RunStatus], Any]) -> str:
        return _by_variant([(run.spec.label, str(describe(run))) for run in runs])

    def of_config(describe: Callable[[Config], Any]) -> str:
        return of_run(lambda run: describe(run.spec.config))

    seeds = sorted({run.spec.seed for run in runs})
    held_out = of_run(lambda run: run.summary["meta"].get("validation_classes", "unknown"))
    return {
        "dataset": of_config(lambda c: _dataset(shards[c.data.shards])),
        "manifest": of_config(lambda c: shards[c.data.shards].digest),
        "test protocol": of_config(lambda c: _test(shards[c.data.shards], c)),
        "model selection": of_config(_selection) + f" (validation classes: {held_out})",
        "seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "backbone": of_config(lambda c: f"{c.model.backbone}, {c.model.embedding_dim} dimensions, "
                                        f"{c.model.pooling} pooling"),
        "pretraining data": of_config(_pretraining),
        "images": of_config(lambda c: f"{c.data.size[0]} x {c.data.size[1]}, {c.data.channels} channels, "
                                      f"augmentation {c.data.augment}"),
        "batch": of_config(lambda c: f"{c.batch.global_size} images, {c.batch.samples_per_class} per class"),
        "epochs": of_config(lambda c: f"{c.epochs}" + (f", stopped after {c.max_steps} steps" if c.max_steps else "")),
        "ranking loss": of_config(lambda c: c.ranking.name),
        "optimizer": of_config(lambda c: f"{c.optim.name}, learning rate {c.optim.lr:g} ({c.optim.schedule}), "
                                         f"weight decay {c.optim.weight_decay:g}"),
        "evaluation": of_config(lambda c: f"{c.evaluation.distance} distance, {c.evaluation.conventions} conventions"),
        "precision": of_config(lambda c: c.precision),
        "ranks": of_run(lambda run: run.provenance.get("world_size", "not recorded")),
        "hardware": of_run(lambda run: run.provenance.get("hardware", "not recorded")),
        "git commit": of_run(lambda run: _commit(run.provenance)),
        "versions": of_run(lambda run: ", ".join(f"{name[8:]} {value}" for name, value in run.provenance.items()
                                                 if name.startswith("version."))),
    }  # fmt: skip


def _by_variant(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the one value that all have, or each with the variants that have it."""
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


def _test(manifest: Manifest, config: Config) -> str:
    if not config.evaluation.test or "test" not in manifest.splits:
        return "the test set was not measured"
    roles = [role for shard in manifest.splits["test"] for role in shard.roles]
    queries, galleries = sum(map(asks, roles)), sorted({g for r in roles if (g := gallery_of(r)) is not None})
    if set(roles) == {"both"}:
        return f"self-retrieval of {queries:,} images of classes never trained on"
    named = f" ({', '.join(galleries)})" if any(galleries) else ""
    images = sum(gallery_of(role) is not None for role in roles)
    return f"{queries:,} queries against a gallery of {images:,} images{named}, classes never trained on"


def _selection(config: Config) -> str:
    if config.validation.holds_out:
        chosen = f"the epoch, by {SELECTION_METRIC} on training classes held out for it"
    else:
        chosen = "none: no classes are held out, the last epoch is reported"
    return chosen + ("; best_test chooses on the test set" if config.evaluation.best_test else "")


def _pretraining(config: Config) -> str:
    known = {"none": "none (random initialization)", "torchvision": "ImageNet-1k (torchvision's weights)"}
    return known.get(config.model.pretrained, f"what the weights in {config.model.pretrained} were trained on")
