"""``dist-obdsd doctor``: the machines of a job, and where a config can run."""

import argparse
import math
import os
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_obdsd.cli.output import show
from dist_obdsd.cli.ranks import joined
from dist_obdsd.config import Config, load_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import check_world_size, classes_from, plan_from
from dist_obdsd.data.manifest import Shard
from dist_obdsd.data.remote import is_remote
from dist_obdsd.data.schedule import allowed_world_sizes
from dist_obdsd.data.shard_reader import cache_of, check_files
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError
from dist_obdsd.machine import usable_cores
from dist_obdsd.models.backbones import library_weights
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.training.evaluation import check_evaluable
from dist_obdsd.training.memory import estimate
from dist_obdsd.training.run_dir import read_status

PARTS = {
    "torch": "everything",
    "torchvision": "backbones and transforms",
    "torchcodec": "quick decoding of images (Pillow gives the same pixels)",
    "webdataset": "reading and writing shards",
    "faiss": "evaluation.backend=faiss (torch gives the same result)",
    "mlflow": "tracking",
    "deepspeed": "strategy=deepspeed",
}
"""Package -> what needs it."""
GIB = 2**30
MIN_OPEN_FILES = 4096  # for many workers, shards and sockets
MAX_SKEW = 2.0  # seconds between hosts' clocks, beyond which their logs cannot be put in order
PROBE_MIB = 16


def doctor(options: argparse.Namespace) -> int:
    """Print what the machines have and, for a config, where it can run. Collective."""
    with joined(lambda: load_config(options.config, options.overrides) if options.config else None) as (config, rank):
        rows = machine(rank)
        if rank.world_size > 1:
            rows |= {"": ""} | job(rank, config)
        show("\n".join(f"{name:14} {text}".rstrip() for name, text in rows.items()))
        if config is not None:
            with raise_on_all_ranks("the config"):
                lines = where_it_runs(rank, config)
            show("\n" + "\n".join(lines))
            with raise_on_all_ranks("the network"):
                line = _weights(config, options.download and rank.launch.local_rank == 0)
            show(line)
    return 0


def machine(here: Runtime) -> dict[str, str]:
    """Describe this rank's machine, a line by its name."""
    launch, files = here.launch, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus)
    rows = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}, host {platform.node()}",
        "launcher": f"{launch.launcher}, rank {launch.rank} of {launch.world_size}",
        "cpu": f"{usable_cores()} cores, torch uses {torch.get_num_threads()} threads in this process",
        "gpu": found or f"none that torch finds (built for CUDA {torch.version.cuda or 'none'})",
        "backend": "nccl" if gpus else "gloo",
        "disk": f"{_free_gib('.'):.1f} GiB free here",
        "open files": _advised(f"at most {files}", files < MIN_OPEN_FILES, f"raise it to {MIN_OPEN_FILES} (ulimit -n)"),
    }
    if Path("/dev/shm").is_dir():  # where NCCL keeps its buffers
        free, advice = _free_gib("/dev/shm"), "NCCL needs more (docker run --shm-size=8g)"
        rows["shared memory"] = _advised(f"{free:.1f} GiB free", bool(gpus) and free < 1, advice)
    return rows | {module: version(module) or f"missing: needed for {purpose}" for module, purpose in PARTS.items()}


def job(here: Runtime, config: Config | None) -> dict[str, str]:
    """Describe what the ranks of a job measure together. Collective."""
    # Before they measure: a message from a CPU to a GPU would never arrive.
    advice = "let every rank see a GPU, or set device=cpu"
    collectives.assert_equal_across_ranks("the ranks' device", here.device.type, InputError, advice)
    own = {"host": platform.node(), "threads": torch.get_num_threads(), "cores": usable_cores(),
           "versions": {module: version(module) for module in PARTS}}  # fmt: skip
    facts = collectives.gather_json(own)
    hosts: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        hosts.setdefault(fact["host"], []).append(rank)
    busiest = max(sum(facts[rank]["threads"] for rank in ranks) / facts[ranks[0]]["cores"] for ranks in hosts.values())
    differing = [module for module in PARTS if len({fact["versions"][module] for fact in facts}) > 1]
    collectives.gather_json(None)  # all have arrived
    before = time.time()
    times = collectives.gather_json(before)
    skew, error = max(times) - min(times), time.time() - before
    x = torch.ones(PROBE_MIB * 2**18, device=here.device)
    reducing = _timed(lambda: collectives.sum_across(x), here)
    b = max(config.batch.global_size // here.world_size, 1) if config else 112
    D = config.model.embedding_dim if config else 128
    E_bD = torch.ones(b, D, device=here.device)
    gathering = _timed(lambda: collectives.gather_rows(E_bD), here)
    return {
        "hosts": "; ".join(f"{host}: ranks {', '.join(map(str, ranks))}" for host, ranks in hosts.items()),
        "devices": here.device.type,
        "threads": _advised(f"{busiest:.1f} of torch per core on the busiest host", busiest > 1, "lower threads"),
        "versions": f"{', '.join(differing)} differ between the ranks" if differing else "alike",
        "clocks": _advised(f"apart by {skew:.3f} s (+- {error:.3f} s)", skew > MAX_SKEW, "run an NTP client"),
        "all-reduce": f"{PROBE_MIB} MiB in {1e3 * reducing:.1f} ms, {PROBE_MIB / 2**10 / reducing:.2f} GiB/s",
        "gather": f"embeddings of {b} x {here.world_size} images, {D} dimensions: {1e3 * gathering:.2f} ms",
    }


def where_it_runs(here: Runtime, config: Config) -> list[str]:
    """List the world sizes that a config allows, and what it finds here.

    Raises:
        InputError: its device, shards, schedule, run folder or packages do not fit.
    """
    manifest = manifests.load(config.data.shards)
    classes, held_out = classes_from(config, manifest)
    plan = plan_from(config, manifest, classes, epoch=0)
    for package, user, other in (
        ("mlflow", config.tracking.kind, "tracking.kind=none"), ("deepspeed", config.strategy, "strategy=ddp"),
    ):  # fmt: skip
        if package == user and version(package) is None:
            raise InputError(f"{package} is not installed; install it or set {other}")
    check_world_size(config, here.world_size)
    shards = tuple(manifest.shards())
    check_files(config.data.shards, shards, sizes=True)
    check_evaluable(manifest, config, held_out)
    sizes = allowed_world_sizes(config.data.lanes)
    local = ", ".join(f"{config.batch.global_size // size} on {size}" for size in sizes)
    node = f"; one rank per GPU, and this node has {torch.cuda.device_count()}" if here.device.type == "cuda" else ""
    lines = [
        f"{config.name}: runs on {here.device.type} with {', '.join(map(str, sizes))} ranks "
        f"(images per rank: {local}){node}",
        f"{len(classes)} classes to train on, {len(held_out)} held out for validation, "
        f"{plan.steps} steps an epoch, showing {plan.coverage:.1%} of the images that could come; each draws anew",
    ]
    if is_remote(config.data.shards):
        lines.append(_remote(config, shards))
    lines.append(plan.diversity)
    if plan.too_small:
        K = config.batch.samples_per_class
        lines.append(f"{plan.too_small} classes have fewer than batch.samples_per_class={K} images and are never shown")
    lines += [*_memory(here, config, here.world_size if here.world_size > 1 else sizes[-1]), _run_folder(config)]
    return [*lines, _tracking(config)] if here.is_main else lines


def _memory(here: Runtime, config: Config, ranks: int) -> list[str]:
    """Estimate a rank's memory, also of other strategies where it does not fit."""
    zero = 1
    if config.strategy == "deepspeed":
        from dist_obdsd.training.deepspeed import engine_options

        zero = engine_options(config.deepspeed.config, config.deepspeed.stage)["zero_optimization"]["stage"]
    needed = estimate(config, ranks, zero)
    there = torch.cuda.get_device_properties(here.device).total_memory if here.device.type == "cuda" else math.inf
    too_much = sum(needed[config.strategy].values()) > there
    lines = []
    for strategy in needed if too_much else [config.strategy]:
        listed = ", ".join(f"{part} {size / GIB:.3g}" for part, size in needed[strategy].items())
        total = sum(needed[strategy].values()) / GIB
        lines.append(f"memory of each of {ranks} ranks, strategy={strategy}: {total:.3g} GiB ({listed})")
    if too_much:
        lines.append(f"strategy={config.strategy} needs more than the {there / GIB:.3g} GiB of this GPU")
    return lines


def _remote(config: Config, shards: Sequence[Shard]) -> str:
    """Say how large remote shards are, and count those in the cache."""
    line = f"{len(shards)} remote shards of {sum(shard.bytes for shard in shards) / GIB:.3g} GiB"
    cache = cache_of(config.data)
    if cache is None:
        return f"{line}; data.cache is unset, so every epoch reads them anew"
    present = sum(cache.path(shard).exists() for shard in shards)
    return f"{line}; {present} are in {cache.folder}, which has {_free_gib(cache.folder):.1f} GiB free"


def _weights(config: Config, download: bool) -> str:
    """Build the network to see whether its weights are there and fit."""
    section = config.model
    found = library_weights(section.backbone, section.pretrained) if section.library else None
    if found is not None and found.path() is None and not download:
        without = f"; without it {section.fallback} is trained (model.fallback)" if section.fallback else ""
        return f"weights: {found.file} is not in {found.folder}; --download fetches it{without}"
    network = build_embedder(config, torch.device("cpu"))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    where = section.pretrained if found is None else found.path()
    return f"network: {section.backbone} with {millions:.1f} million weights, from {where}"


def _run_folder(config: Config) -> str:
    folder = config.run_dir
    above = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(above, os.W_OK):
        raise InputError(f"the run folder {folder} cannot be made: {above} is not writable; choose another output")
    free, state = _free_gib(above), read_status(folder).get("state", "new")
    return _advised(f"run folder {folder}: {state}, {free:.1f} GiB free there", free < 1, "make room")


def _tracking(config: Config) -> str:
    """Ask the tracking store for an answer; a run goes on without it."""
    if config.tracking.kind == "none":
        return "tracking: none"
    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"tracking: {uri} will be made by the first run"  # asking would make it
    from dist_obdsd.tracking import mlflow_backend

    started = time.perf_counter()
    try:
        mlflow_backend.connect(uri)
    except Exception as error:
        return f"tracking: {uri} does not answer ({' '.join(str(error).split())[:120]}); a run would go on without it"
    return f"tracking: {uri} answers after {time.perf_counter() - started:.1f} s"


def _advised(fact: str, wrong: bool, advice: str) -> str:
    return f"{fact}; {advice}" if wrong else fact


def _timed(call: Callable[[], Any], here: Runtime) -> float:
    """Measure the seconds of a call: the median of five, after one that warms up."""
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        call()
        if here.device.type == "cuda":
            torch.cuda.synchronize(here.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _free_gib(folder: str | Path) -> float:
    return shutil.disk_usage(folder).free / GIB


def version(module: str) -> str | None:
    """Return the installed version, or None where the module is missing."""
    for name in (module, f"{module}-gpu", f"{module}-cpu"):  # faiss has several
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None
