"""The shadow of a device: it finds every kind of wait, and the product's steps have none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_obdsd.manifold import targets
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
    "a host tensor mixed in": lambda x: x + M,
    "a list index": lambda x: x[[0, 2]],
    "tolist": lambda x: x.tolist(),
    "linalg.solve": lambda x: torch.linalg.solve(x, x),
    "copy_ from the host": lambda x: x.copy_(M),
    "copy_ to the host": lambda x: M.clone().copy_(x),
    ".item()": lambda x: x.sum().item(),
    "equal": lambda x: torch.equal(x, x + 1),
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


def test_a_wait_in_the_backward_is_found():
    x = X.clone().requires_grad_()
    with Shadow([x]) as shadow:
        y = 2 * x
        y.register_hook(lambda grad: grad * float(grad.sum()))
        assert not shadow.found
        y.sum().backward()
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


LOSSES = ("multi_similarity", "contrastive", "triplet", "margin ranking.lr=0.1", "proxy_anchor ranking.lr=0.1")
TARGETS = ("none", "uniform", "psd", "obdsd", "obdsd_symmetric")
OPTIONS = [
    "batch.chunk=8",
    "distillation.memory=40",
    "distillation.mask_self=true",
    "distillation.neighbours=4",
    "distillation.neighbours=6 distillation.mutual=true",
    "distillation.solver=cholesky",
    "distillation.solver=cg",
    "distillation.transition_temperature=0.01 distillation.omega=0.9",
    "distillation.clip=true distillation.power=3",
    "distillation.scope=rank",
    "optim.clip_norm=1",
    "optim.name=sgd optim.head_scale=3",
    "optim.name=adamw precision=bf16",
    "distillation.teacher_precision=bf16",
    "precision=float64",
]
STEPS = [*OPTIONS, *(f"distillation.target={target} ranking.name={loss}" for target in TARGETS for loss in LOSSES)]


@pytest.mark.parametrize("overrides", STEPS)
def test_no_step_waits_or_mixes(overrides):
    rig = Rig(settings("small_cnn", *overrides.split()), CPU)
    rig.step.early_diffusion = True
    for t in range(2):  # makes the optimizer's state, and finds out how the diffusion is to be queued
        rig.take(rig.batch(t))
    batch = rig.batch(2)
    with Shadow(tensors_of(rig.step)) as shadow:
        rig.take(batch)
    assert shadow.found == []
    assert shadow.looks == rig.config.distillation.target.startswith("obdsd")  # at the error, when it is long known


def test_a_solver_that_looks_too_early_is_found_with_its_place(monkeypatch):
    monkeypatch.setattr(targets, "start_async", lambda *args: None)
    with pytest.raises(AssertionError, match=r"manifold/solvers.py:\d+ _local_scalar_dense"):
        test_no_step_waits_or_mixes("distillation.target=obdsd")
