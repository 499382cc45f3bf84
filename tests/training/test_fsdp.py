"""FSDP2 against DDP: steps and the teacher. NaN and bf16: test_train_step; whole runs, kills, moves: test_survival."""

import pytest
import torch
from torch import nn

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.models.teacher import ProgressiveTeacher, load_teacher_state
from dist_obdsd.training.strategy import build_strategy
from tests import harness
from tests.training.test_train_step import CPU, WHOLE, same_on, settings

FSDP = "strategy=fsdp"
WAYS = {
    "obdsd": ((1, 2), WHOLE),
    "chunks, clipped, proxies, gem": (
        (3,),
        [*WHOLE, "batch.chunk=5", "ranking.name=proxy_anchor", "ranking.lr=0.1", "optim.clip_norm=0.1",
         "model.pooling=gem"],
    ),
    "recomputed, a frozen stem": (
        (2,), [*WHOLE, "model.freeze=1", "model.checkpoint_blocks=true", "distillation.target=psd"]
    ),
    "two replicas, adam": (
        (4,), [*WHOLE, "fsdp.replicate=2", "optim.name=adam", "optim.lr=1e-4", "distillation.target=obdsd_symmetric"]
    ),
    "float32": ((2,), ["optim.name=sgd", "optim.lr=1e-2", "precision=float32"]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_are_those_of_ddp(way):
    world_sizes, more = WAYS[way]
    close = 1e-5 if way == "float32" else 1e-10
    same_on(world_sizes, settings(*more, FSDP), close, settings(*more), rel=10 * close, abs=close)


def promote(replicate: int) -> str:
    """Promote a sharded student; the message of the error when one rank's teacher is spoilt."""
    rank, W = collectives.rank(), collectives.world_size()
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    teacher = ProgressiveTeacher(student)
    strategy = build_strategy(
        student, settings(FSDP, f"fsdp.replicate={replicate}"), Runtime(Launch("test", rank, W, rank, W), CPU), []
    )
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
    if rank == W - 1:
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
