"""What this machine has, and where a config can run."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_obdsd import runtime
from dist_obdsd.config import Config, load_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Shard
from dist_obdsd.data.mixing import mixing_of
from dist_obdsd.data.reading import cache_of, check_files
from dist_obdsd.data.remote import begin, is_remote, location
from dist_obdsd.data.schedule import allowed_world_sizes, plan_from
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.protocols import check_evaluable, validation_subset

PARTS = {
    "torch": "everything",
    "torchvision": "backbones and image decoding",
    "webdataset": "reading and writing shards",
    "faiss": "the faiss search backend (the torch one gives the same result)",
    "mlflow": "tracking",
    "deepspeed": "the DeepSpeed launcher",
}
DISTRIBUTIONS = {"faiss": ("faiss-gpu", "faiss-cpu", "faiss")}


def report(config: Path | None, overrides: Sequence[str] = ()) -> str:
    """A few lines for the terminal.

    Raises:
        InputError: the config cannot run here, with the reason.
    """
    lines = machine()
    if config is not None:
        settings = load_config(config, overrides)
        lines += ["", *where_it_runs(settings)]
    return "\n".join(lines)


def machine() -> list[str]:
    launch = runtime.read_launch(os.environ)
    devices = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    disk, shared = shutil.disk_usage("."), Path("/dev/shm")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "launcher": f"{launch.launcher}, rank {launch.rank} of {launch.world_size}",
        "cpu": f"{cores} cores, torch uses {torch.get_num_threads()} threads in this process",
        "gpu": "; ".join(devices) or f"none that torch finds (built for CUDA {torch.version.cuda or 'none'})",
        "backend": _backends(),
        "disk": f"{disk.free / 2**30:.1f} GiB free here",
    }
    if shared.is_dir():
        rows["shared memory"] = f"{shutil.disk_usage(shared).free / 2**30:.1f} GiB free"
    for module, purpose in PARTS.items():
        rows[module] = version(module) or f"missing: needed for {purpose}"
    return [f"{name:14} {text}" for name, text in rows.items()]


def _backends() -> str:
    found = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    chosen = "nccl" if torch.cuda.is_available() else "gloo"
    return f"torch has {' and '.join(found) or 'none'}; several ranks here talk over {chosen}"


def version(module: str) -> str | None:
    """The installed version, or None where the module cannot be imported."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def where_it_runs(settings: Config) -> list[str]:
    """The world sizes that a config allows, from its own shards.

    Raises:
        InputError: its device, shards or schedule do not fit.
    """
    launch, gpus = runtime.read_launch(os.environ), torch.cuda.device_count()
    device = runtime.choose_device(settings.device, launch, gpus)
    manifest = manifests.load(settings.data.shards)
    classes, held_out = manifests.split_classes(manifest, settings.validation, settings.seed)
    plan = plan_from(settings, manifest, classes, epoch=0)
    if settings.tracking.kind == "mlflow" and version("mlflow") is None:
        raise InputError("tracking.kind=mlflow but mlflow is not installed; install it or set tracking.kind=none")
    sizes = allowed_world_sizes(settings.data.lanes)
    local = ", ".join(f"{settings.batch.global_size // size} on {size}" for size in sizes)
    shards = tuple(manifest.shards())
    check_files(settings.data.shards, shards)
    check_evaluable(manifest, settings, validation_subset(manifest, held_out, settings))
    too_small = []
    if plan.too_small:
        too_small.append(
            f"{plan.too_small} classes have fewer than batch.samples_per_class={settings.batch.samples_per_class} "
            f"images and are never shown"
        )
    here = f"; one rank per GPU, and this node has {gpus}" if device.type == "cuda" else ""
    return [
        f"{settings.name}: runs on {device.type} with {', '.join(map(str, sizes))} ranks "
        f"(images per rank: {local}){here}",
        f"{len(classes)} classes to train on, {len(held_out)} held out for validation, "
        f"{plan.steps} steps an epoch, {plan.coverage:.1%} of the reachable images in it",
        *_remote(settings, shards),
        f"{mixing_of(plan, settings.batch.samples_per_class)}",
        *too_small,
    ]


def _remote(settings: Config, shards: Sequence[Shard]) -> list[str]:
    """What there is to say of shards that are not here: whether one can be read, and what the cache has."""
    root = settings.data.shards
    if not is_remote(root):
        return []
    begin(location(root, shards[0].file))
    size = sum(shard.bytes for shard in shards) / 2**30
    line = f"{len(shards)} remote shards of {size:.3g} GiB, the first of which can be read"
    cache = cache_of(settings.data)
    if cache is None:
        return [f"{line}; data.cache is unset, so every epoch reads them anew"]
    present = sum(cache.path(shard).exists() for shard in shards)
    free = shutil.disk_usage(cache.folder).free / 2**30
    return [f"{line}; {present} are in {cache.folder}, which has {free:.1f} GiB free"]
