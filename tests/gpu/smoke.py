"""What every step needs of a device: solvers, masks, no waits, a process group, uploads."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.stream import TrainBatch, TrainStream
from dist_obdsd.distributed import collectives
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.training.train_step import DelayedMetrics
from dist_obdsd.transfer import DeviceUploader
from tests import oracle
from tests.gpu.rig import CPU, CheckError, Rig, distance, same_bits, settings, started, within
from tests.gpu.runs import make_jpegs, shards
from tests.manifold.data import clustered
from tests.shadow import Shadow, tensors_of

CASES = ((1.0, 0.3), (0.1, 0.5), (0.005, 0.5), (0.005, 0.99))
"""Transition temperature and omega: CUB200's, between the two, SOP's, and CARS196's omega at SOP's temperature."""
LIMIT = 1e-4
"""Of a gradient's relative error: two float32 sums of the same numbers in another order."""


def batches(B: int) -> dict[str, torch.Tensor]:
    """Unit rows in pairs; such with near-duplicates; and such with an outlier besides."""
    ordinary = clustered(0, B, 64, 0.5)
    duplicates = ordinary.clone()
    duplicates[1::4] = functional.normalize(duplicates[::4] + 1e-4 * duplicates[2::4], dim=1)
    outliers = duplicates.clone()
    outliers[7] = functional.normalize(-ordinary.mean(0), dim=0)
    return {"pairs": ordinary, "near-duplicates": duplicates, "outliers": outliers}


def solvers_agree(device: torch.device, quick: bool) -> str:
    """Series, Cholesky and conjugate gradients, in float32 where TF32 was allowed before the process began.

    A row's L1 error may be the tolerance that the solver promises, and what float32's rounding of the cosines, 1e-7 or
    so, becomes when it is divided by the temperature and the diffusion adds it up.
    """
    B, worst = (64 if quick else 448), 0.0
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as some other library may have it; 10 bits would not do
    try:
        with started(device):
            for name, T_BD in batches(B).items():
                for temperature, omega in CASES:
                    chosen = {"temperature": 0.1, "transition_temperature": temperature, "omega": omega}
                    wanted_BB = oracle.target(T_BD.double(), target="obdsd", **chosen)
                    limit = 1e-4 + 4e-7 / temperature / (1 - omega)
                    for solver in ("auto", "cholesky", "cg"):
                        found = manifold.target_rows(T_BD.to(device), slice(0, B), Diffusion(solver=solver, **chosen))
                        error = float((found.target_bB.to(CPU).double() - wanted_BB).abs().sum(1).max())
                        within(f"{solver} on {name}, t={temperature:g}, omega={omega:g}: L1 error", error, limit)
                        worst = max(worst, error / limit)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return f"at most {worst:.0%} of what is allowed"


def masked_step_changes_nothing(device: torch.device, quick: bool) -> str:
    """A step with a NaN leaves every bit of weights and optimizer as it was; the next step goes on from there."""
    tensors = 0
    for name in ("adam",) if quick else ("adam", "adamw", "sgd"):
        for precision in ("float32", "bf16"):
            rig = Rig(settings("small_cnn", f"optim.name={name}", f"precision={precision}"), device)
            rig.take()
            bias = rig.student.head.bias
            kept, before = bias.detach().clone(), rig.state()
            tensors = len(before)
            with torch.no_grad():
                bias.fill_(torch.nan)
            masked = rig.numbers()["masked"]
            with torch.no_grad():
                bias.copy_(kept)
            after = rig.state()
            if masked != 1 or not same_bits(after, before):
                changed = [name for name in before if not torch.equal(after[name], before[name])]
                raise CheckError(f"{name} in {precision}: masked is {masked:.0f} and {changed[:3]} changed")
            if rig.numbers()["masked"] or same_bits(rig.state(), before):
                raise CheckError(f"{name} in {precision}: the step after the masked one did nothing")
    return f"the same bits in {tensors} tensors"


def step_does_not_wait(device: torch.device, quick: bool) -> str:
    """No number comes back to the host inside 50 steps, and none goes to the device in a way that waits.

    A GPU itself complains where something waits for it (``torch.cuda.set_sync_debug_mode``); a CPU has the shadow. The
    first steps find out how the diffusion is to be queued, and may wait.
    """
    steps, count = (1 if quick else 50), 0
    for overrides in (
        ["distillation.target=none"], ["distillation.target=psd"], [], ["distillation.transition_temperature=0.005"],
        ["distillation.target=obdsd_symmetric"], ["batch.chunk=8", "optim.clip_norm=1"],
    ):  # fmt: skip
        rig = Rig(settings("small_cnn", "precision=bf16", *overrides), device)
        for t in range(3):
            rig.take(rig.batch(t))
        ahead = [rig.batch(t) for t in range(min(steps, 10))]
        waits = _waits_of_gpu(rig, ahead, steps) if device.type == "cuda" else _waits_of_shadow(rig, ahead, steps)
        if waits:
            raise CheckError(f"steps with {' '.join(overrides) or 'obdsd'} wait: {', '.join(waits)}")
        count += steps
    return f"nothing in {count} steps makes the host wait"


def _waits_of_shadow(rig: Rig, ahead: list[TrainBatch], steps: int) -> list[str]:
    with Shadow(tensors_of(rig.step)) as shadow:
        for t in range(steps):
            rig.take(ahead[t % len(ahead)])
    return shadow.found


def _waits_of_gpu(rig: Rig, ahead: list[TrainBatch], steps: int) -> list[str]:
    reader = DelayedMetrics(lag=2 * steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(steps):
            names, numbers = rig.take(ahead[t % len(ahead)])
            list(reader.push({}, names, numbers))
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = [dict(read) for _, read in reader.drain()]
    return [] if len(values) == steps and not any(value["masked"] for value in values) else ["and some were masked"]


def group_of_one(device: torch.device, quick: bool) -> str:
    """The device's own backend with one rank: gather with gradient, reduce-scatter, all-reduce, DDP's buckets."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = Rig(settings("small_cnn"), device)
    alone.take()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = torch.randn(8, 4, device=device, requires_grad=True)
        weights = torch.randn(8, 4, device=device)
        # ``gather_rows`` itself returns the rows of a world of one as they are.
        (collectives._GatherRows.apply(rows) * weights).sum().backward()
        total = weights.clone()
        dist.all_reduce(total)
        if rows.grad is None or not torch.equal(rows.grad, weights) or not torch.equal(total, weights):
            raise CheckError("a gather, reduce-scatter or all-reduce with one rank changed its numbers")
        rig = Rig(settings("small_cnn"), device)
        ids = [device.index or 0] if device.type == "cuda" else None
        rig.strategy.network = DistributedDataParallel(rig.student, device_ids=ids, gradient_as_bucket_view=True)
        rig.take()
        return f"{backend}: {within('gradient through DDP', distance(rig.gradients, alone.gradients), LIMIT)}"
    finally:
        dist.destroy_process_group()


def uploads_arrive(device: torch.device, quick: bool) -> str:
    """Every batch of two epochs reaches a busy device as it was, though its memory is used again and again."""
    upload, arrived = DeviceUploader(device), []
    with shards(lambda images: make_jpegs(images, 24, (120, 90))) as folder:
        raw: dict[str, Any] = {
            "name": "uploads", "epochs": 2, "batch": {"global_size": 16, "samples_per_class": 2},
            "data": {"shards": str(folder / "packed"), "image_size": 96, "augment": "crop", "workers": 2, "lanes": 4},
        }  # fmt: skip
        config = parse_config(raw, "the check")
        busy = torch.randn(64 if quick else 2048, 64 if quick else 2048, device=device)
        for batch in _stream(config, pinned=device.type == "cuda"):
            for _ in range(8):  # what the copy must not wait for, and what must not overtake it
                busy = (busy @ busy).clamp_(-1, 1)
            arrived.append(upload(batch.images_b).clone())
            del batch
        for batch, there in zip(_stream(config), arrived, strict=True):
            if not torch.equal(there.cpu(), batch.images_b):
                raise CheckError(f"step {batch.step} of epoch {batch.epoch} arrived with other pixels")
    return f"{len(arrived)} batches with their pixels"


def _stream(config: Config, pinned: bool = False) -> Iterator[TrainBatch]:
    manifest = manifests.load(config.data.shards)
    classes, _ = classes_from(config, manifest)
    with closing(TrainStream(manifest, classes, config, 0, 1, pinned=pinned)) as stream:
        yield from stream
        if pinned:  # the stream gives back the memory that the latest copies may still read
            torch.cuda.synchronize()


CHECKS = {"solvers": solvers_agree, "masked": masked_step_changes_nothing, "waiting": step_does_not_wait,
          "group": group_of_one, "uploads": uploads_arrive}  # fmt: skip
