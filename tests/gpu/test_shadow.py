"""The shadow of a device: it finds every kind of wait, and the product's steps have none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.rig import CPU, Rig, settings
from tests.shadow import Shadow, tensors_of

X, M = torch.randn(4, 4), torch.randn(4, 4)
PLANTED: dict[str, Callable[[Tensor], object]] = {
    ".cpu()": lambda x: x.cpu(),
    '.to("cpu")': lambda x: x.to("cpu"),
    ".numpy()": lambda x: x.numpy(),
    "mask indexing": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.__setitem__(x > -99, x.flatten().clone()),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "a host tensor mixed in": lambda x: x + M,
    "a list index": lambda x: x[[0, 2]],
    "tolist": lambda x: x.tolist(),
    "bincount": lambda x: (x > 0).flatten().long().bincount(),
    "linalg.solve": lambda x: torch.linalg.solve(x, x),
    "copy_ from the host": lambda x: x.copy_(M),
    "copy_ to the host": lambda x: M.clone().copy_(x),
    ".item()": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "an index by a number": lambda x: x[x.flatten().argmax() % 4],
    "equal": lambda x: torch.equal(x, x + 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "numbers taken in": lambda x: torch.tensor([1.0], device=x.device),
    "numbers taken in like": lambda x: x.new_tensor([1.0]),
    "pageable memory sent": lambda x: M.to(x.device),
    "repeat_interleave": lambda x: x.repeat_interleave((x[:, 0] > 0).long(), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_wait_is_found(kind):
    x = X.clone()
    with Shadow([x]) as shadow:
        PLANTED[kind](x)
    assert shadow.found


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * float(grad.sum())


def test_a_wait_in_the_backward_is_found():
    x = X.clone().requires_grad_()
    with Shadow([x]) as shadow:
        y = Waits.apply(x).square().sum()
        assert not shadow.found
        y.backward()
    assert shadow.found == ["elsewhere _local_scalar_dense"]


def test_the_work_of_a_device_and_of_the_host_are_no_waits():
    x, labels = X.clone().requires_grad_(), torch.arange(4)
    with Shadow([x]) as shadow:
        made = torch.zeros(4, device=x.device)
        y = torch.where(x > 0, x, 0.0) @ made + x.new_full((4,), 3.0) + torch.tensor(2.0)
        y[torch.ones(4, dtype=torch.bool, device=x.device)] = 0.0
        y.sum().backward()
        x.detach().add_(x.grad, alpha=-0.1)
        assert labels[labels > 1].tolist() == [2, 3]
        assert float(M.sum()) == M.sum().item()
    assert shadow.found == []


LOSSES = {
    "multi_similarity": [],
    "contrastive": [],
    "triplet": [],
    "margin": ["ranking.lr=0.1"],
    "proxy_anchor": ["ranking.lr=0.1"],
}
TARGETS = ("none", "uniform", "psd", "obdsd", "obdsd_symmetric")
WAYS = {
    "chunks": ["batch.chunk=8"],
    "memory": ["distillation.memory=40"],
    "mask_self": ["distillation.mask_self=true"],
    "neighbours": ["distillation.neighbours=4"],
    "mutual neighbours": ["distillation.neighbours=6", "distillation.mutual=true"],
    "cholesky": ["distillation.solver=cholesky"],
    "conjugate gradients": ["distillation.solver=cg"],
    "sharp": ["distillation.transition_temperature=0.01", "distillation.omega=0.9"],
    "clip and power": ["distillation.clip=true", "distillation.power=3"],
    "scope": ["distillation.scope=rank"],
    "clipped gradient": ["optim.clip_norm=1"],
    "sgd, faster head": ["optim.name=sgd", "optim.head_scale=3"],
    "adamw, bf16": ["optim.name=adamw", "precision=bf16"],
    "bf16 teacher": ["distillation.teacher_precision=bf16"],
    "float64": ["precision=float64"],
}
"""Of the objective and the step beside targets and losses."""


def look_at_a_step(*overrides: str) -> Shadow:
    """Take three steps of a small network, the last one in a shadow."""
    rig = Rig(settings("small_cnn", *overrides), CPU)
    rig.step.early_diffusion = True
    for t in range(2):  # makes the optimizer's state, and finds out how the diffusion is to be queued
        rig.take(rig.batch(t))
    batch = rig.batch(2)
    with Shadow(tensors_of(rig.step)) as shadow:
        rig.take(batch)
    return shadow


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_step_waits_or_mixes(target, loss):
    shadow = look_at_a_step(f"distillation.target={target}", f"ranking.name={loss}", *LOSSES[loss])
    assert shadow.found == []
    assert shadow.looks == target.startswith("obdsd")  # at the diffusion's error, when it is long known


@pytest.mark.parametrize("way", WAYS)
def test_no_option_makes_a_step_wait(way):
    assert look_at_a_step(*WAYS[way]).found == []
