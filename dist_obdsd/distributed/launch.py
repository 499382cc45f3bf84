"""From a launcher's environment to a rank with its device and process group.

Four launchers are understood: torchrun, DeepSpeed's, SLURM's srun, and none, for a single process.
"""

import gc
import logging
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.transfer import AsyncHostCopy

PATIENCE = 5.0
"""Seconds without the other ranks after which a node logs whom it waits for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """The ranks as a launcher's environment describes them."""

    launcher: str
    """torchrun, deepspeed, environment (variables set by hand), srun or single."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None


@dataclass(frozen=True)
class Runtime:
    """One rank of a running job."""

    launch: Launch
    device: torch.device

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch(env: Mapping[str, str]) -> Launch:
    """Read the launcher's variables. Pure.

    Raises:
        InputError: some of the variables are missing, not numbers or contradict each other.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in env]:
            raise InputError(
                f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun, "
                f"or unset RANK and WORLD_SIZE for a single process"
            )
        marks = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
        launcher = next((name for mark, name in marks.items() if mark in env), "environment")
        numbers = [env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]]
        local_world = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
        host, port = env["MASTER_ADDR"], env["MASTER_PORT"]
    elif "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS", "1") != "1":
        launcher = "srun"
        numbers = [env.get("SLURM_PROCID", ""), env["SLURM_NTASKS"], env.get("SLURM_LOCALID", "")]
        # SLURM compresses this list, too: "4(x2)" is four tasks on each of two nodes.
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1"))
        local_world = re.split(r"[(,]", tasks)[0]
        host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "")))
        # Every rank must find the same free port; jobs on one node differ by their id.
        port = env.get("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        return Launch("single")
    try:
        rank, world, local_rank, local, number = map(int, [*numbers, local_world, port])
    except ValueError as error:
        raise InputError(f"the {launcher} environment holds a rank, size or port that is no number: {error}") from error
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} is not within the world size {world}; check the launcher")
    return Launch(launcher, rank, world, local_rank, local, (host, number))


def restart_trap(env: Mapping[str, str]) -> str | None:
    """Explain why torchrun could not restart ranks; None if it could. Pure.

    Its agents keep one store for all attempts, with old addresses (https://github.com/pytorch/pytorch/issues/135712).
    """
    if env.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        "torchrun --max-restarts lets restarted ranks wait for ranks that are gone; export "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, as launch/torchrun.sh does"
    )


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if not match:
        raise InputError("srun gave no SLURM_STEP_NODELIST; set MASTER_ADDR to the first node's name")
    return match[1] + (match[2] or "")


def choose_device(wanted: str, launch: Launch, gpus: int) -> torch.device:
    """Choose this rank's device; ``auto``: a GPU each if there are enough, else CPU.

    Args:
        gpus: CUDA devices that this process sees.

    Raises:
        InputError: CUDA is asked for and missing, or the node has fewer GPUs than ranks.
    """
    if launch.launcher == "srun" and gpus == 1:
        return torch.device("cpu" if wanted == "cpu" else "cuda:0")  # --gpus-per-task=1 shows each task its own alone
    ranks = max(launch.local_world_size, launch.local_rank + 1)  # variables set by hand may leave the first one out
    if wanted == "cpu" or (wanted == "auto" and gpus < ranks):
        return torch.device("cpu")
    if not gpus:
        raise InputError("device=cuda but torch finds no CUDA device here; set device=cpu or run on a GPU machine")
    if gpus < ranks:
        raise InputError(f"this node has {gpus} GPUs for {ranks} ranks; start at most {gpus} processes per node")
    return torch.device("cuda", launch.local_rank)


@contextmanager
def start(
    device: str = "auto", threads: int = 1, timeout_seconds: float = 600.0, group_of_one: bool = False
) -> Iterator[Runtime]:
    """Join the process group that the environment describes, and leave it at the end.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads of this rank.
        timeout_seconds: how long a collective waits for the other ranks.
        group_of_one: make a process group for a single process, too, as DeepSpeed and FSDP need it.
    """
    launch = read_launch(os.environ)
    chosen = choose_device(device, launch, torch.cuda.device_count())
    torch.set_num_threads(threads)
    # Similarities and solves must keep float32's 24 bits; TF32 would silently leave 11 of them.
    torch.backends.cuda.matmul.allow_tf32 = False
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Earlier than NCCL's watchdog, which would end this process before it could say which rank hangs.
        AsyncHostCopy.patience = 0.9 * timeout_seconds
        # A gather runs beside the student's forward pass, whose kernels it must not queue behind.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    if launch.world_size > 1:
        assert launch.master is not None
        host, port = launch.master
        address = f"{host}:{port}"
        if host in ("127.0.0.1", "localhost"):
            # gloo asks the resolver for this host's name, which fails or is slow on many laptops and containers.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        who = f"rank {launch.rank} of {launch.world_size} on {platform.node()}"
        waiting = threading.Timer(PATIENCE, logger.warning, [f"{who} waits at {address} for the others"])
        if launch.local_rank == 0:
            waiting.start()
        try:
            dist.init_process_group(
                # Small bookkeeping messages stay on the CPU; only tensors that live on the GPU travel over NCCL.
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        except (dist.DistError, RuntimeError) as error:
            if "EADDRINUSE" in str(error):
                message = f"another program listens at {address}; set another MASTER_PORT on every rank"
                raise RunError(message) from error
            raise RunError(
                f"{who} did not meet the others at {address} ({str(error).splitlines()[0][:160]}); check that all "
                f"ranks were launched and that every node can reach this address"
            ) from error
        finally:
            waiting.cancel()
    elif group_of_one:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Runtime(launch, chosen)
    # Not after a failure: leaving in good order would wait for ranks that may be stuck waiting for this one.
    if dist.is_initialized():
        # Garbage may still hold the group, whose threads abort a process that exits with them.
        gc.collect()
        dist.destroy_process_group()
