"""The estimate of a rank's memory against tensors that are there."""

import pytest
import torch

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.memory import estimate
from dist_obdsd.training.strategy import build_strategy
from tests import harness
from tests.training.test_train_step import CPU, B, settings


def bytes_of_a_rank(*overrides: str) -> dict[str, int]:
    """Bytes that a rank really holds, and that its forward pass saves."""
    rank, W = collectives.rank(), collectives.world_size()
    config = settings(*overrides)
    student = build_embedder(config, CPU)
    teacher = ProgressiveTeacher(student)
    strategy = build_strategy(student, config, Runtime(Launch("test", rank, W, rank, W), CPU), [])
    strategy.shard(teacher.network, teacher=True)
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows = strategy.embed(torch.zeros(B // W, 1, 16, 16, dtype=torch.uint8))
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
