"""What runs need of a device: solvers, masks, no waits, a process group, uploads, resumed runs, evaluations."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd import checkpoint
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.stream import TrainBatch, TrainStream
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.evaluation.evaluator import measure
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.metric_parts import Settings
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.training import strategy
from dist_obdsd.training.checkpoint_manager import CheckpointManager
from dist_obdsd.training.train_step import DelayedMetrics
from dist_obdsd.transfer import DeviceUploader
from tests import oracle
from tests.gpu.rig import CPU, Rig, distance, same_bits, settings, within
from tests.gpu.test_exact import SUMMED
from tests.manifold.data import clustered

CASES = ((1.0, 0.3), (0.1, 0.5), (0.005, 0.5), (0.005, 0.99))
"""Transition temperature and omega: CUB200's, between the two, SOP's, and CARS196's omega at SOP's temperature."""


def batches(B: int) -> dict[str, torch.Tensor]:
    """Unit rows in pairs; such with near-duplicates; and such with an outlier besides."""
    ordinary = clustered(0, B, 64, 0.5)
    duplicates = ordinary.clone()
    duplicates[1::4] = functional.normalize(duplicates[::4] + 1e-4 * duplicates[2::4], dim=1)
    outliers = duplicates.clone()
    outliers[7] = functional.normalize(-ordinary.mean(0), dim=0)
    return {"pairs": ordinary, "near-duplicates": duplicates, "outliers": outliers}


@pytest.mark.parametrize(("temperature", "omega"), CASES)
def test_solvers_agree(device, temperature, omega):
    """Series, Cholesky and conjugate gradients, in float32 where TF32 was allowed before the process began.

    A row's L1 error may be the tolerance that the solver promises, and what float32's rounding of the cosines, 1e-7 or
    so, becomes when it is divided by the temperature and the diffusion adds it up.
    """
    B = 64 if device.type == "cpu" else 448
    chosen = {"temperature": 0.1, "transition_temperature": temperature, "omega": omega}
    limit = 1e-4 + 4e-7 / temperature / (1 - omega)
    torch.backends.cuda.matmul.allow_tf32 = True  # as some other library may have it; 10 bits would not do
    with launch.start(device.type):
        for name, T_BD in batches(B).items():
            wanted_BB = oracle.target(T_BD.double(), target="obdsd", **chosen)
            for solver in ("auto", "cholesky", "cg"):
                found = manifold.target_rows(T_BD.to(device), slice(0, B), Diffusion(solver=solver, **chosen))
                error_B = (found.target_bB.to(CPU).double() - wanted_BB).abs().sum(1)
                within(f"{solver} on {name}: L1 error", float(error_B.max()), limit)


def test_a_solver_that_rounds_is_found(monkeypatch):
    def rounded(x: torch.Tensor) -> torch.Tensor:  # to TF32's ten bits
        return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).to(x.dtype)

    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(rounded(a), rounded(b)))
    with pytest.raises(AssertionError, match="L1 error"):
        test_solvers_agree(CPU, *CASES[0])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_masked_step_changes_nothing(device, name, precision):
    """A step with a NaN leaves every bit of weights and optimizer as it was; the next step goes on from there."""
    rig = Rig(settings("small_cnn", f"optim.name={name}", f"precision={precision}"), device)
    rig.take()
    bias = rig.student.head.bias.detach()
    kept, before = bias.clone(), rig.state()
    bias.fill_(torch.nan)
    assert rig.numbers()["masked"] == 1
    bias.copy_(kept)
    assert same_bits(rig.state(), before), "the masked step changed something"
    assert not rig.numbers()["masked"]
    assert not same_bits(rig.state(), before)


def test_a_step_that_is_not_masked_is_found(monkeypatch):
    prepare = strategy._prepare
    monkeypatch.setattr(strategy, "_prepare", lambda optimizer, masked, rate: prepare(optimizer, 0 * masked, rate))
    with pytest.raises(AssertionError, match="changed"):
        test_a_masked_step_changes_nothing(CPU, "adam", "float32")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    ["distillation.target=none", "distillation.target=psd", "distillation.target=obdsd",
     "distillation.transition_temperature=0.005", "distillation.target=obdsd_symmetric",
     "batch.chunk=8 optim.clip_norm=1"],
)  # fmt: skip
def test_a_step_does_not_wait(gpu, overrides):
    """No number comes back to the host inside 50 steps, and none goes to the device in a way that waits.

    The GPU itself complains where something waits for it (a CPU has the shadow). The first steps find out how the
    diffusion is to be queued, and may wait.
    """
    rig = Rig(settings("small_cnn", "precision=bf16", *overrides.split()), gpu)
    for t in range(3):
        rig.take(rig.batch(t))
    steps = 50
    ahead, reader = [rig.batch(t) for t in range(10)], DelayedMetrics(lag=2 * steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(steps):
            names, numbers = rig.take(ahead[t % len(ahead)])
            list(reader.push({}, names, numbers))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [dict(read)["masked"] for _, read in reader.drain()] == [0] * steps


def test_a_group_of_one_changes_no_number(device):
    """The device's own backend with one rank: gather with gradient, reduce-scatter, all-reduce, DDP's buckets."""
    alone = Rig(settings("small_cnn"), device)
    alone.take()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = torch.randn(8, 4, device=device, requires_grad=True)
        weights = torch.randn(8, 4, device=device)
        # ``gather_rows`` itself returns the rows of a world of one as they are.
        (collectives._GatherRows.apply(rows) * weights).sum().backward()
        total = weights.clone()
        dist.all_reduce(total)
        assert torch.equal(rows.grad, weights)
        assert torch.equal(total, weights)
        rig = Rig(settings("small_cnn"), device)
        ids = [device.index] if device.type == "cuda" else None
        rig.strategy.network = DistributedDataParallel(rig.student, device_ids=ids, gradient_as_bucket_view=True)
        rig.take()
        within("gradient through DDP", distance(rig.gradients, alone.gradients), SUMMED)
    finally:
        dist.destroy_process_group()


def test_uploads_arrive(device, shards):
    """Every batch of two epochs reaches a busy device as it was, though its memory is used again and again."""
    raw = {
        "name": "uploads", "epochs": 2, "batch": {"global_size": 16, "samples_per_class": 2},
        "data": {"shards": str(shards), "image_size": 96, "augment": "crop", "workers": 2, "lanes": 4},
    }  # fmt: skip
    config, upload, arrived = parse_config(raw, "the check"), DeviceUploader(device), []
    n = 64 if device.type == "cpu" else 2048
    busy = torch.randn(n, n, device=device)
    for batch in stream(config, pinned=device.type == "cuda"):
        for _ in range(8):  # what the copy must not wait for, and what must not overtake it
            busy = (busy @ busy).clamp_(-1, 1)
        arrived.append(upload(batch.images_b).clone())
        del batch
    for batch, there in zip(stream(config), arrived, strict=True):
        assert torch.equal(there.cpu(), batch.images_b)


def stream(config: Config, pinned: bool = False) -> Iterator[TrainBatch]:
    manifest = manifests.load(config.data.shards)
    classes, _ = classes_from(config, manifest)
    with closing(TrainStream(manifest, classes, config, 0, 1, pinned=pinned)) as batches:
        yield from batches
        if pinned:  # the stream gives back the memory that the latest copies may still read
            torch.cuda.synchronize()


# ---- whole runs and evaluations ----

METRICS = ["recall", "map@r", "r_precision", "map@c", "f1", "distances", "rho_spectrum"]
if importlib.util.find_spec("sklearn") is not None:  # which a machine with a GPU may lack
    METRICS.append("nmi")
ROUNDING = 1e-3
"""How far a resumed run's weights may be off where no two runs give the same bits, relative to their norm."""


def test_a_resumed_run_is_the_same(device, train, folder):
    """Stopped by ``max_steps`` inside an epoch and started again: the weights of a run that was not stopped.

    The same bits, where the device gives one run's bits again. A GPU may not, even when torch is asked for
    deterministic kernels, since some backward passes have none; then two runs of which none was stopped say how far
    apart such runs are, and the resumed one must be as near.
    """
    common = (f"device={device.type}", "precision=float32", "optim.name=sgd", "optim.lr=0.01", "evaluation.test=false")
    ways = {"whole": [[]], "again": [[]], "resumed": [["max_steps=5"], ["max_steps=7"], []], "other": [["seed=1"]]}
    weights = {}
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # where torch has no such kernel
            for way, attempts in ways.items():
                for more in attempts:
                    train(f"name={way}", *common, *more)
                weights[way] = checkpoint.load(folder / "runs" / way)["student"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert distance(weights["other"], weights["whole"]) > 100 * ROUNDING  # the control
    if not same_bits(weights["resumed"], weights["whole"]):
        assert not same_bits(weights["again"], weights["whole"]), "only the resumed run ends elsewhere"
        print(f"this device does not repeat its bits: {distance(weights['again'], weights['whole']):.1e}")
        within("distance of the resumed run", distance(weights["resumed"], weights["whole"]), ROUNDING)


def test_a_resumed_run_that_forgets_is_found(train, folder, monkeypatch):
    load_state_dict = CheckpointManager._load_state_dict
    monkeypatch.setattr(
        CheckpointManager, "_load_state_dict", lambda self, state: load_state_dict(self, state | {"optimizer": {}})
    )
    with pytest.raises(AssertionError, match="only the resumed run ends elsewhere"):
        test_a_resumed_run_is_the_same(CPU, train, folder)


@pytest.mark.parametrize("distance_of", ["cosine", "euclidean"])
def test_an_evaluation_is_the_same(device, distance_of):
    """All metrics of the same embeddings, searched on the CPU and, in another order, on the device: the same bits."""
    n = 600 if device.type == "cpu" else 3000
    draw = torch.Generator().manual_seed(0)
    labels_n = torch.arange(n) // 6
    centres = torch.randn(n // 6, 48, generator=draw).repeat_interleave(6, 0)
    rows_nD = unit_rows(functional.normalize(centres + 2 * torch.randn(n, 48, generator=draw), dim=1))
    rows_nD[1::3] = rows_nD[::3]  # ties, which ids decide
    settings = Settings(METRICS, (1, 10, 100), backend="torch", distance=distance_of)
    with launch.start(device.type):
        wanted, found = (
            measure(rows_nD[order_n], order_n, labels_n[order_n], ["both"] * n, settings, device=where).metrics
            for where, order_n in ((CPU, torch.arange(n)), (device, torch.randperm(n, generator=draw)))
        )
    assert found == wanted
