"""DeepSpeed and FSDP2 against DDP: steps, NaN, bf16, teacher, memory. Whole runs, kills and moves: test_survival."""

import numpy as np
import pytest
import torch
from torch import nn

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.models.teacher import ProgressiveTeacher, load_teacher_state
from dist_obdsd.training.memory import estimate
from dist_obdsd.training.strategy import build_strategy
from tests import harness
from tests.training.test_train_step import WHOLE, alone, build_step, distance, same_on, settings, take_steps, this_rank

FSDP = ["strategy=fsdp"]
ZERO_1, ZERO_2 = (["strategy=deepspeed", f"deepspeed.stage={stage}"] for stage in (1, 2))
SGD = ["precision=float32", "optim.name=sgd", "optim.lr=1e-2"]
ADAM_CLIPPED = ["precision=float32", "optim.lr=1e-5", "optim.clip_norm=0.01"]
PROXIES = [*SGD, "optim.clip_norm=0.1", "ranking.name=proxy_anchor"]
WAYS = {
    "fsdp": ((1, 2), FSDP, WHOLE),
    "fsdp, chunks, clipped, proxies, gem": (
        (3,), FSDP,
        [*WHOLE, "batch.chunk=5", "ranking.name=proxy_anchor", "ranking.lr=0.1", "optim.clip_norm=0.1",
         "model.pooling=gem"],
    ),
    "fsdp, recomputed, a frozen stem": (
        (2,), FSDP, [*WHOLE, "model.freeze=1", "model.checkpoint_blocks=true", "distillation.target=psd"]
    ),
    "fsdp, two replicas, adam": (
        (4,), [*FSDP, "fsdp.replicate=2"],
        [*WHOLE, "optim.name=adam", "optim.lr=1e-4", "distillation.target=obdsd_symmetric"],
    ),
    "fsdp, float32": ((2,), FSDP, SGD),
    "zero 1": ((2,), ZERO_1, SGD),
    "zero 1, adam, clipped": ((2,), ZERO_1, ADAM_CLIPPED),
    "zero 1, proxies": ((2,), ZERO_1, PROXIES),
    "zero 1, chunks, a faster head": ((2,), ZERO_1, [*SGD, "batch.chunk=5", "optim.head_scale=3"]),
    "zero 2, adam, clipped": ((2,), ZERO_2, ADAM_CLIPPED),
    "zero 2, proxies": ((2,), ZERO_2, PROXIES),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_are_those_of_ddp(way):
    world_sizes, strategy, more = WAYS[way]
    close = 1e-10 if "precision=float64" in more else 1e-5
    same_on(world_sizes, settings(*more, *strategy), close, settings(*more))


def test_the_default_clipping_of_deepspeed_would_be_seen():
    assert distance(alone(*SGD)[1], alone(*SGD, "optim.clip_norm=1")[1]) > 1e-3


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
        assert [step["masked"] for step in losses] == [float(t == spoil) for t in range(10)]
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


def promote(replicate: int) -> str:
    """Promote a sharded student; the message of the error when one rank's teacher is spoilt."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    teacher = ProgressiveTeacher(student)
    strategy = build_strategy(student, settings(*FSDP, f"fsdp.replicate={replicate}"), this_rank(), [])
    strategy.shard(teacher.network, teacher=True)
    with torch.no_grad():
        student[0].weight.mul_(2)
        student[1].running_mean.add_(1)
    x = torch.ones(1, 4)
    # The control: parameters alone do not make the teacher the student.
    with torch.no_grad():
        for theirs, ours in zip(student.parameters(), teacher.network.parameters(), strict=True):
            ours.copy_(theirs)
    expected = strategy.whole_student().eval()(x)
    assert not torch.allclose(teacher(x), expected)
    teacher.update(student)
    assert torch.equal(teacher(x), expected)
    assert torch.equal(student.eval()(x), expected)
    whole = {"network": {n: shards.whole(t) for n, t in student.state_dict().items()}, "epoch": 3}
    whole["network"]["2.bias"] = torch.tensor([5.0, 7.0])
    load_teacher_state(teacher, whole)
    assert shards.whole(teacher.network[2].bias).tolist() == [5.0, 7.0]
    assert teacher.epoch == 3
    if collectives.rank() == collectives.world_size() - 1:
        shards.local(student[2].bias.detach()).add_(1)
    try:
        teacher.update(student)
    except RunError as error:
        return str(error)
    return ""


def test_the_sharded_teacher_is_the_sharded_student():
    assert harness.run(2, promote, 1) == ["", ""]  # each rank has values of its own
    for message in harness.run(2, promote, 2):
        assert "1 tensors (2.bias, shard 0)" in message
    with pytest.raises(AssertionError, match=f"{InputError.__name__}: fsdp.replicate=2 does not divide the 3 ranks"):
        harness.run(3, promote, 2)


def bytes_of_a_rank(*overrides: str) -> dict[str, int]:
    """Bytes that a rank really holds, and that its forward pass saves."""
    step = build_step(settings(*overrides))
    strategy, student, teacher = step.strategy, step.strategy.student, step.teacher
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows = strategy.embed(torch.zeros(12, 1, 16, 16, dtype=torch.uint8))  # of 24 images on two ranks
    own = {shards.local(p.detach()).untyped_storage().data_ptr() for p in student.parameters()}
    activations = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own)
    strategy.step(rows.sum(), torch.zeros(()), 1e-3)
    states = [x for state in strategy.optimizer.state.values() for x in state.values() if x.dim()]
    kept = {"weights": student.parameters(), "optimizer": states, "teacher": teacher.network.parameters()}
    found = {part: sum(shards.local(x).nbytes for x in tensors) for part, tensors in kept.items()}
    return found | {"activations": activations}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_holds_what_was_estimated(strategy):
    overrides = (f"strategy={strategy}", "precision=float32")
    expected = estimate(settings(*overrides), 2)[strategy]
    found = harness.run(2, bytes_of_a_rank, *overrides)[0]
    for part in ("weights", "optimizer", "teacher"):
        assert found[part] == expected[part], part
    if strategy == "ddp":  # FSDP's gathered weights are saved, too, without staying
        assert found["activations"] == pytest.approx(expected["activations"], rel=0.02)


def test_each_strategy_cuts_up_what_it_says():
    found = estimate(settings("model.checkpoint_blocks=true", "fsdp.replicate=2"), 8, zero_stage=2)
    ddp, zero, fsdp = (found[name] for name in ("ddp", "deepspeed", "fsdp"))
    assert zero["weights"] == ddp["weights"] > 3 * fsdp["weights"] > ddp["weights"] / 2  # over 4 ranks
    assert zero["gradients"] < ddp["gradients"] / 6
    assert fsdp["activations"] == ddp["activations"] < estimate(settings(), 8)["ddp"]["activations"]
    assert estimate(settings("distillation.target=none"), 8)["ddp"]["teacher"] == 0
