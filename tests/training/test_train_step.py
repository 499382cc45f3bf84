"""The real training step, and whole runs, on several processes against one: losses, gradient norms and weights."""

import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from dist_obdsd import checkpoint
from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.distributed.shards import whole
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import DelayedMetrics, TrainProgress, TrainStep
from tests import harness, runs
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


def initial(config: Config) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in build_embedder(config, CPU).named_parameters()}


def this_rank() -> Runtime:
    rank, W = collectives.rank(), collectives.world_size()
    return Runtime(Launch("test", rank, W, rank, W), CPU)


def build_step(config: Config) -> TrainStep:
    """The training step of this rank, whose teacher is the initial student."""
    student, objective = build_embedder(config, CPU), build_objective(config, range(9), CPU)
    teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
    strategy = build_strategy(student, config, this_rank(), list(objective.ranking.named_parameters()))
    if teacher is not None:
        strategy.shard(teacher.network, teacher=True)
    return TrainStep(config, this_rank(), strategy, teacher, objective, range(9))


def take_steps(
    config: Config, spoil: int | None = None, later: bool = False
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Ten steps of epoch 1.

    Args:
        spoil: a step with NaN in one rank's weights.
        later: look at the diffusion's error as late as with a GPU, and fail where the host reads anything before.
    """
    rank, world = collectives.rank(), collectives.world_size()
    step = build_step(config)
    step.early_diffusion = later or None
    student, reader, read = step.strategy.student, DelayedMetrics(lag=1), []
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
    own = {f"ranking.{name}": p for name, p in step.objective.ranking.named_parameters()}
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


def same_on(world_sizes: tuple[int, ...], config: Config, close: float = 1e-10, one: Config | None = None) -> Any:
    """Check that steps on several ranks are those of one process, and return what that one found.

    Args:
        close: how far weights may be apart after the steps; numbers of a step, ten times as far in their own size.
        one: the config of the one process, where that is another.
    """
    ((losses, weights),) = harness.run(1, take_steps, one or config)
    for world_size in world_sizes:
        for other_losses, other_weights in harness.run(world_size, take_steps, config):
            assert distance(weights, other_weights) < close
            for mine, other in zip(losses, other_losses, strict=True):
                assert results(other) == pytest.approx(results(mine), rel=10 * close, abs=close)
    return losses, weights


@pytest.mark.parametrize("target", ["none", "uniform", "psd", "obdsd", "obdsd_symmetric"])
def test_ten_steps_in_float64_do_not_depend_on_the_ranks(target):
    config = settings("precision=float64", f"distillation.target={target}")
    _, weights = same_on((2, 3), config, 1e-11)
    assert distance(weights, initial(config)) > 1e-3
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
    unchunked = [setting for setting in WAYS[way] if not setting.startswith("batch.chunk=")]
    losses, _ = same_on((3,), settings(*WHOLE, *WAYS[way]), one=settings(*WHOLE, *unchunked))
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


def test_a_memory_changes_the_target_from_the_second_step_on():
    losses, remembered = alone(*WHOLE, "distillation.memory=40")
    assert distance(alone(*WHOLE)[1], remembered) > 1e-8
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
    proxies = build_objective(config, range(9), CPU).ranking.proxies
    start = initial(config) | {"ranking.proxies": proxies.detach().numpy()}
    assert weights.keys() == start.keys()
    for name in start:
        assert (abs(weights[name] - start[name]).max() < 1e-9) == name.startswith(part)


def test_the_gradient_s_norm_is_clipped_alike_on_all_ranks():
    plain = ("precision=float64", "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.lr=1")
    losses, weights = same_on((2,), settings(*plain, "optim.clip_norm=1e-3"))
    # Ten steps of length 1e-3 at most, where the unclipped gradient is longer.
    moved = np.sqrt(sum(((weights[name] - start) ** 2).sum() for name, start in initial(settings(*plain)).items()))
    assert min(step["grad_norm"] for step in losses) > 1e-3
    assert 0 < moved <= 1e-2 * (1 + 1e-9)
    assert distance(weights, alone(*plain)[1]) > 1e-2


# Adam divides by the gradient's size, so rounding in gradients near 0 becomes a part of lr: hence a small lr there.
@pytest.mark.parametrize("optimizer", ["optim.name=sgd optim.lr=1e-2", "optim.name=adam optim.lr=1e-5"])
def test_ten_steps_in_float32_agree_to_1e_5(optimizer):
    same_on((2,), settings(*optimizer.split()), 1e-5)


LOSSES = {"ranking", "distillation", "target_entropy", "grad_norm", "anchors"}


def test_losses_weights_and_metrics_do_not_depend_on_the_ranks(train, folder, untouched):
    alone = untouched("epochs=2")
    others = [untouched("epochs=2", ranks=ranks) for ranks in (2, 4)]
    train("name=workers", "epochs=2")  # without any
    reference = runs.metrics(alone, "step")
    assert len(reference) == 12
    assert any("distillation" in row for row in reference)
    for run in (*others, folder / "runs" / "workers"):
        for row, expected in zip(runs.metrics(run, "step"), reference, strict=True):
            assert row.keys() == expected.keys()
            for loss in row.keys() & LOSSES:
                assert row[loss] == pytest.approx(expected[loss], rel=1e-9, abs=1e-9)
    weights = checkpoint.load(alone)["student"]
    rows = runs.summary(alone)["rows"]
    for run in others:
        theirs = checkpoint.load(run)["student"]
        assert all((theirs[name] - value).abs().max() < 1e-9 for name, value in weights.items())
        assert runs.summary(run)["rows"] == rows
    # The control: another seed begins and ends elsewhere.
    train("name=control", "epochs=2", "seed=1")
    control = folder / "runs" / "control"
    assert abs(runs.metrics(control, "step")[0]["ranking"] - reference[0]["ranking"]) > 1e-6
    assert (checkpoint.load(control)["student"]["head.weight"] - weights["head.weight"]).abs().max() > 1e-3
