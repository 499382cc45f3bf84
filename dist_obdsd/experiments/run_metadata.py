"""Conditions of a comparison's runs, which a reader needs to judge their numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_obdsd.config import Config
from dist_obdsd.config.base import flatten
from dist_obdsd.data.manifest import Manifest, asks, gallery_of
from dist_obdsd.experiments.run_status import RunStatus

SETTINGS = (
    "model.backbone", "model.embedding_dim", "model.pooling", "data.image_size", "data.augment", "batch.global_size",
    "batch.samples_per_class", "epochs", "max_steps", "ranking.name", "optim.name", "optim.lr", "optim.schedule",
    "optim.weight_decay", "evaluation.distance", "evaluation.conventions", "precision",
)  # fmt: skip
PRETRAINING = {"none": "none (random initialization)", "torchvision": "ImageNet-1k (torchvision's weights)"}


def run_metadata(runs: Sequence[RunStatus], shards: Mapping[str, Manifest]) -> dict[str, str]:
    """Describe data, settings, machines and versions, by variant where these differ."""
    found: dict[str, dict[str, dict[str, None]]] = {}  # name -> value -> labels of the variants
    for run in runs:
        for name, value in _facts(run, shards[run.spec.config.data.shards]).items():
            found.setdefault(name, {}).setdefault(str(value), {})[run.spec.label] = None
    seeds = sorted({run.spec.seed for run in runs})
    described = {"seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})"}
    for name, values in found.items():
        whose = [f"{', '.join(labels)}: {value}" for value, labels in values.items()]
        described[name] = next(iter(values)) if len(values) == 1 else "; ".join(whose)
    return described


def _facts(run: RunStatus, manifest: Manifest) -> dict[str, Any]:
    config, provenance = run.spec.config, run.provenance
    settings, weights = flatten(config.model_dump(mode="json")), config.model.pretrained
    held_out = run.summary["meta"].get("validation_classes", "unknown")
    uncommitted = " with uncommitted changes" * (provenance.get("git_dirty") == "true")
    versions = {name.removeprefix("version."): v for name, v in provenance.items() if name.startswith("version.")}
    return {
        "dataset": _dataset(manifest),
        "manifest": manifest.digest,
        "test protocol": _test(manifest, config),
        "model selection": f"{_selection(config)} (validation classes: {held_out})",
        "pretraining data": PRETRAINING.get(weights, f"what the weights in {weights} were trained on"),
        **{name: settings[name] for name in SETTINGS},
        "ranks": provenance.get("world_size", "not recorded"),
        "hardware": provenance.get("hardware", "not recorded"),
        "git commit": f"{provenance.get('git_commit', 'not recorded')}{uncommitted}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


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
        chosen = f"the epoch, by {config.evaluation.select_by} on training classes held out for it"
    else:
        chosen = "none: no classes are held out, the last epoch is reported"
    return chosen + ("; best_test chooses on the test set" if config.evaluation.best_test else "")
