"""The real training step on several processes against one: losses, gradient norms and weights after 10 steps."""

import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.distributed.shards import whole
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import DelayedMetrics, TrainProgress, TrainStep
from tests import harness
from tests.shadow import Shadow, tensors_of

B, STEPS = 24, 10
CPU = torch.device("cpu")


def settings(*overrides: str) -> Config:
    raw = {
        "name": "x", "epochs": 2, "optim": {"lr": 0.001},
        "data": {"shards": "x", "image_size": 16, "channels": 1, "mean": [0.5], "std": [0.5], "lanes": 6},
        "batch": {"global_size": B, "samples_per_class": 2},
        "model": {"backbone": "small_cnn", "embedding_dim": 8},
        "distillation": {"weight": 2, "temperature": 0.1, "transition_temperature": 0.05},
    }  # fmt: skip
    return parse_config(override_config(raw, overrides), "x")


def take_steps(
    config: Config, spoil: int | None = None, later: bool = False
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Ten steps of epoch 1, whose teacher is the initial student.

    Args:
        spoil: a step with NaN in one rank's weights.
        later: look at the diffusion's error as late as with a GPU, and fail where the host reads anything before.
    """
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(Launch("test", rank, world, rank, world), CPU)
    student = build_embedder(config, CPU)
    objective = build_objective(config, range(9), CPU)
    teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
    strategy = build_strategy(student, config, runtime, list(objective.ranking.named_parameters()))
    if teacher is not None:
        strategy.shard(teacher.network, teacher=True)
    step = TrainStep(config, runtime, strategy, teacher, objective, range(9))
    step.early_diffusion = later or None
    reader, read = DelayedMetrics(lag=1), []
    b = B // world
    for t in range(STEPS):
        draw = torch.Generator().manual_seed(t)
        images = torch.randint(0, 256, (B, 1, 16, 16), dtype=torch.uint8, generator=draw)
        labels = torch.arange(B) // 2 % 9  # some classes stand twice in the batch
        if t == spoil:
            # One rank's embeddings become NaN through a weight that the next line mends again.
            kept = student.head.bias.detach().clone()
            if rank == world - 1:
                student.head.bias.data.fill_(torch.nan)
        batch = TrainBatch(1, t, images[rank * b : (rank + 1) * b], torch.arange(b), labels)
        with Shadow(tensors_of(step)) if later else nullcontext() as shadow:
            names, numbers = step(batch, TrainProgress(1, t, t), t / STEPS)
        # The first step compares sizes between the ranks; another finds out how the diffusion is to be queued.
        assert not (later and t > 1 and shadow.found), shadow.found
        if t == spoil:
            student.head.bias.data.copy_(kept)
        read += [values for _, values in reader.push({}, names, numbers)]
    read += [values for _, values in reader.drain()]
    own = {f"ranking.{name}": p for name, p in objective.ranking.named_parameters()}
    return read, {name: whole(p.detach()).numpy().copy() for name, p in [*student.named_parameters(), *own.items()]}


@functools.cache
def alone(*overrides: str) -> Any:
    """What ``take_steps`` returns in one process."""
    return harness.run(1, take_steps, settings(*overrides))[0]


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(abs(a[name] - b[name]).max()) for name in a)


def results(step: dict[str, float]) -> dict[str, float]:
    """A step's numbers without those that say how a rank solved for its rows."""
    return {name: value for name, value in step.items() if name not in ("target_iterations", "target_residual")}


def same_on(
    world_sizes: tuple[int, ...], config: Config, apart: float = 1e-10, one: Config | None = None, **close: float
) -> Any:
    """Check that steps on several ranks are those of one process, and return what that one found.

    Args:
        apart: how far weights may be after the steps.
        one: the config of the one process, where that is another.
        close: pytest.approx's arguments for the numbers of a step.
    """
    ((losses, weights),) = harness.run(1, take_steps, one or config)
    for world_size in world_sizes:
        for other_losses, other_weights in harness.run(world_size, take_steps, config):
            assert distance(weights, other_weights) < apart
            for mine, other in zip(losses, other_losses, strict=True):
                assert results(other) == pytest.approx(results(mine), **(close or {"rel": 1e-9, "abs": 1e-9}))
    return losses, weights


@pytest.mark.parametrize("target", ["none", "uniform", "psd", "obdsd", "obdsd_symmetric"])
def test_ten_steps_in_float64_do_not_depend_on_the_ranks(target):
    config = settings("precision=float64", f"distillation.target={target}")
    _, weights = same_on((2, 3), config, rel=1e-10, abs=1e-10)
    initial = dict(build_embedder(config, CPU).named_parameters())
    assert distance(weights, {name: p.detach().numpy() for name, p in initial.items()}) > 1e-3
    # The control: another objective ends elsewhere.
    _, elsewhere = alone("precision=float64", "distillation.weight=9")
    assert distance(weights, elsewhere) > 1e-6


WHOLE = ("precision=float64", "optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.01", "optim.clip_norm=1")
WAYS = {
    "chunks that do not divide": ["batch.chunk=5", "ranking.name=proxy_anchor", "ranking.lr=0.1"],
    "memory, tiles": ["distillation.memory_gib=1e-9", "distillation.memory=40", "distillation.neighbours=4"],
    "symmetric memory": ["distillation.memory=40", "distillation.target=obdsd_symmetric"],
    "conjugate gradients": ["distillation.solver=cg", "distillation.omega=0.9"],
    "margin": ["ranking.name=margin", "ranking.lr=0.1", "ranking.nu=0.01", "ranking.weight_decay=0.1"],
    "proxies, adam": ["ranking.name=proxy_anchor", "ranking.lr=0.1", "optim.name=adam", "optim.lr=1e-4"],
    "mined": ["ranking.name=pml.MarginLoss", "ranking.miner=pml.DistanceWeightedMiner"],
}
"""Each part alone is compared with one process in tests/losses and tests/manifold."""


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_objective_is_exact_on_any_ranks(way):
    losses, _ = same_on((3,), settings(*WHOLE, *WAYS[way]))
    assert len({step["ranking"] for step in losses}) > 1


@pytest.mark.parametrize("ranking", ["multi_similarity", "margin"])
def test_the_host_reads_nothing_within_a_step(ranking):
    """Of every other loss and option: tests/gpu."""
    gentle = settings(
        "precision=float32", "optim.lr=1e-5", "optim.clip_norm=1", f"ranking.name={ranking}",
        "distillation.temperature=1", "distillation.transition_temperature=1", "distillation.omega=0.3",
    )  # fmt: skip
    now, later = (harness.run(2, take_steps, gentle, None, later)[0] for later in (False, True))
    assert distance(now[1], later[1]) < 1e-6
    # The control: where no matrix is kept, a solver that iterates looks at what it has so far.
    iterating = settings("precision=float32", "distillation.memory_gib=1e-9", f"ranking.name={ranking}")
    with pytest.raises(Exception, match="_local_scalar_dense"):
        harness.run(1, take_steps, iterating, None, True)


def test_a_teacher_in_bf16_changes_the_target_by_rounding():
    common = ("precision=float32", "optim.lr=1e-5")
    full, _ = alone(*common)
    low, _ = alone(*common, "distillation.teacher_precision=bf16")
    assert low[0]["ranking"] == full[0]["ranking"]
    assert low[0]["distillation"] != full[0]["distillation"]
    assert low[0]["distillation"] == pytest.approx(full[0]["distillation"], abs=0.01)


def test_chunks_change_nothing_and_a_memory_does():
    _, whole = alone(*WHOLE)
    _, chunked = alone(*WHOLE, "batch.chunk=5")
    assert distance(whole, chunked) < 1e-10
    losses, remembered = alone(*WHOLE, "distillation.memory=40")
    assert distance(whole, remembered) > 1e-8
    dropped = [step["target_dropped_mass"] for step in losses]
    assert dropped[0] == 0  # nothing to remember yet
    assert 0.01 < dropped[1] < dropped[2] < 1  # B, then 40 nodes


@pytest.mark.parametrize(
    ("part", "rates"),
    [("head.", ("optim.lr=0.01", "optim.head_scale=1e-12")), ("ranking.", ("optim.lr=0.01", "ranking.lr=1e-14"))],
)
def test_a_part_learns_at_its_own_rate(part, rates):
    sgd = "precision=float64", "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "ranking.name=proxy_anchor"
    _, weights = alone(*sgd, *rates)
    config = settings(*sgd)
    start = {name: p.detach().numpy() for name, p in build_embedder(config, CPU).named_parameters()}
    start["ranking.proxies"] = build_objective(config, range(9), CPU).ranking.proxies.detach().numpy()
    assert weights.keys() == start.keys()
    for name in start:
        assert (abs(weights[name] - start[name]).max() < 1e-9) == name.startswith(part)


def test_one_rank_s_manifold_is_its_own_where_the_scope_says_so():
    scoped = settings(*WHOLE, "distillation.scope=rank")
    _, whole = alone(*WHOLE)
    _, own = alone(*WHOLE, "distillation.scope=rank")
    assert distance(whole, own) == 0
    halves = harness.run(2, take_steps, scoped)
    assert distance(halves[0][1], halves[1][1]) == 0
    assert distance(whole, halves[0][1]) > 1e-7


def test_the_gradient_s_norm_is_clipped_alike_on_all_ranks():
    plain = ("precision=float64", "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.lr=1")
    config = settings(*plain)
    losses, weights = same_on((2,), settings(*plain, "optim.clip_norm=1e-3"))
    initial = {name: p.detach().numpy() for name, p in build_embedder(config, CPU).named_parameters()}
    # Ten steps of length 1e-3 at most, where the unclipped gradient is longer.
    moved = np.sqrt(sum(((weights[name] - initial[name]) ** 2).sum() for name in weights))
    assert min(step["grad_norm"] for step in losses) > 1e-3
    assert 0 < moved <= 1e-2 * (1 + 1e-9)
    ((_, unclipped),) = harness.run(1, take_steps, config)
    assert distance(weights, unclipped) > 1e-2


# Adam divides by the gradient's size, so rounding in gradients near 0 becomes a part of lr: hence a small lr there.
@pytest.mark.parametrize("optimizer", ["optim.name=sgd optim.lr=1e-2", "optim.name=adam optim.lr=1e-5"])
def test_ten_steps_in_float32_agree_to_1e_5(optimizer):
    same_on((2,), settings(*optimizer.split()), 1e-5, rel=1e-4, abs=1e-5)


ZERO_WAYS = {
    "sgd": ["optim.name=sgd", "optim.lr=1e-2"],
    "adam, clipped": ["optim.lr=1e-5", "optim.clip_norm=0.01"],
    "with proxies": ["optim.name=sgd", "optim.lr=1e-2", "optim.clip_norm=0.1", "ranking.name=proxy_anchor"],
    "chunks, a faster head": ["optim.name=sgd", "optim.lr=1e-2", "batch.chunk=5", "optim.head_scale=3"],
}


@pytest.mark.parametrize(
    ("way", "stage"), [*((way, 1) for way in ZERO_WAYS), ("adam, clipped", 2), ("with proxies", 2)]
)
def test_deepspeed_takes_the_steps_of_ddp(way, stage):
    config = settings(*ZERO_WAYS[way], "strategy=deepspeed", f"deepspeed.stage={stage}")
    _, weights = same_on((2,), config, 1e-5, settings(*ZERO_WAYS[way]), rel=1e-4, abs=1e-5)
    # The control: what DeepSpeed does by default, a norm clipped at 1, ends elsewhere.
    if way == "sgd":
        _, clipped = alone(*ZERO_WAYS[way], "optim.clip_norm=1")
        assert distance(weights, clipped) > 1e-3


@pytest.mark.parametrize(
    ("spoil", "overrides"),
    [
        (0, "optim.name=adam ranking.name=proxy_anchor batch.chunk=5"),
        (4, "optim.name=sgd ranking.name=pml.ArcFaceLoss"),
        (4, "optim.name=adamw"),
        (4, "strategy=deepspeed deepspeed.stage=1 ranking.name=proxy_anchor batch.chunk=5"),
        (4, "strategy=deepspeed deepspeed.stage=2 ranking.name=proxy_anchor batch.chunk=5"),
        (0, "strategy=fsdp optim.name=sgd"),
        (4, "strategy=fsdp ranking.name=proxy_anchor"),
    ],
)
def test_a_nan_on_one_rank_masks_the_step_on_all(spoil, overrides):
    ranks = harness.run(2, take_steps, settings(*overrides.split()), spoil)
    for losses, weights in ranks:
        assert [step["masked"] for step in losses] == [float(t == spoil) for t in range(STEPS)]
        assert all(np.isfinite(w).all() for w in weights.values())
        assert distance(weights, ranks[0][1]) == 0


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("deepspeed", 1), ("fsdp", 2)])
def test_bf16_trains_and_keeps_the_objective_in_float32(strategy, ranks):
    low = ("precision=bf16", "optim.lr=1e-5")
    losses, weights = harness.run(ranks, take_steps, settings(*low, f"strategy={strategy}"))[0]
    exact, exact_weights = alone("optim.lr=1e-5")
    assert all(np.isfinite(w).all() and w.dtype == np.float32 for w in weights.values())
    assert losses[0]["ranking"] == pytest.approx(exact[0]["ranking"], rel=0.05)
    assert losses[0]["ranking"] != exact[0]["ranking"]
    assert 0 < distance(weights, exact_weights) < 1e-3
    assert distance(weights, alone(*low)[1]) < (1e-3 if strategy == "fsdp" else 1e-6)
