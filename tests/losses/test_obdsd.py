"""The whole objective: W processes give the loss, the gradient and, after 10 steps, the weights of one."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.losses import obdsd as objectives
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.manifold.diffusion import Diffusion
from tests import harness, oracle
from tests.manifold.data import B, unit_rows

Objective = objectives.Objective
worlds = pytest.mark.parametrize("world", harness.WORLD_SIZES)
several = pytest.mark.parametrize("world", [w for w in harness.WORLD_SIZES if w > 1])
TARGETS = ("none", "uniform", "psd", "obdsd", "obdsd_symmetric")
LABELS = {
    "uneven": [0, 0, 0, 1, 2, 1, 3, 4, 5, 6, 3, 2],
    "one rank without an anchor": [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8],
    "no anchor": list(range(B)),
}
RAMP, WEIGHT = 0.5, 30.0
FEATURES = 9


class Embedder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 5)).double()

    def forward(self, x_bF: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.layers(x_bF), dim=1)


def settings(target: str, mask_self: bool = False) -> Diffusion:
    return Diffusion(target=target, temperature=0.2, transition_temperature=0.1, omega=0.7, mask_self=mask_self)


def made(target: str, mask_self: bool = False, **more: Any) -> Objective:
    diffusion = None if target == "none" else settings(target, mask_self)
    return Objective(MultiSimilarityLoss(), diffusion, **{"weight": WEIGHT, **more})


def images(step: int = 0) -> torch.Tensor:
    return unit_rows(100 + step, B, FEATURES)


def local_terms(objective: Objective, student: nn.Module, labels: list[int], step: int = 0) -> dict[str, PartialMean]:
    """This rank's terms of one global batch, through the real gather."""
    b = B // collectives.world_size()
    first_row = collectives.rank() * b
    own_bF = images(step)[first_row : first_row + b]
    E_bD = student(own_bF)
    T_BD = None
    if objective.needs_teacher(RAMP):
        with torch.no_grad():
            T_BD = collectives.gather_rows(Embedder(1)(own_bF))
    return objective.terms(BatchView(E_bD, collectives.gather_rows(E_bD), torch.tensor(labels), first_row), T_BD)


def global_counts(terms: dict[str, PartialMean]) -> dict[str, torch.Tensor]:
    counts = collectives.sum_across(torch.stack([term.count for term in terms.values()]))
    return dict(zip(terms, counts, strict=True))


def mean_gradient(student: nn.Module) -> list[np.ndarray]:
    """What DDP makes of the ranks' gradients."""
    return [
        (collectives.sum_across(parameter.grad) / collectives.world_size()).numpy()
        for parameter in student.parameters()
    ]


def exact(objective: Objective, student: nn.Module, labels: list[int]) -> tuple[torch.Tensor, dict[str, PartialMean]]:
    terms = local_terms(objective, student, labels)
    return objective.loss(terms, global_counts(terms), collectives.world_size(), RAMP), terms


def gather_without_gradient(objective: Objective, student: nn.Module, labels: list[int]) -> Any:
    real = collectives.gather_rows
    try:
        collectives.gather_rows = lambda x_b: real(x_b.detach())
        return exact(objective, student, labels)
    finally:
        collectives.gather_rows = real


def local_loss_only(objective: Objective, student: nn.Module, labels: list[int]) -> Any:
    b = B // collectives.world_size()
    rows = slice(collectives.rank() * b, (collectives.rank() + 1) * b)
    E_bD, T_bD = student(images()[rows]), Embedder(1)(images()[rows]).detach()
    terms = objective.terms(BatchView(E_bD, E_bD, torch.tensor(labels)[rows], 0), T_bD)
    return objective.loss(terms, {name: term.count for name, term in terms.items()}, 1, RAMP), terms


def mean_of_rank_means(objective: Objective, student: nn.Module, labels: list[int]) -> Any:
    terms = local_terms(objective, student, labels)
    return objective.loss(terms, {name: term.count for name, term in terms.items()}, 1, RAMP), terms


Way = Callable[[Objective, nn.Module, list[int]], tuple[torch.Tensor, dict[str, PartialMean]]]


def step_worker(way: Way, target: str, labels: list[int], mask_self: bool = False) -> dict[str, Any]:
    objective, student = made(target, mask_self), Embedder(0)
    loss, terms = way(objective, student, labels)
    loss.backward()
    return {
        "loss": collectives.sum_across(loss).item() / collectives.world_size(),
        "gradient": mean_gradient(student),
        "anchors": terms["ranking"].count.item(),
    }


def reference(target: str, labels: list[int], mask_self: bool = False) -> tuple[float, list[np.ndarray], int]:
    """Loss, gradient and anchors of one process without a process group, from double loops and an explicit inverse."""
    student, distillation, ranking = Embedder(0), settings(target, mask_self), MultiSimilarityLoss()
    E_BD, T_BD = student(images()), Embedder(1)(images()).detach()
    total, count = oracle.multi_similarity(
        E_BD, labels, alpha=ranking.alpha, beta=ranking.beta, threshold=ranking.threshold, margin=ranking.margin
    )
    loss = total / max(count, 1)
    if target != "none":
        names = ("target", "temperature", "transition_temperature", "omega", "mask_self")
        target_BB = oracle.target(T_BD.numpy(), **{name: getattr(distillation, name) for name in names})
        kl = oracle.kl(E_BD, target_BB, distillation.temperature) / B
        loss = loss + RAMP * WEIGHT * distillation.temperature**2 * kl
    loss.backward()
    return loss.item(), [p.grad.numpy() for p in student.parameters()], count


def relative_error(gradient: list[np.ndarray], expected: list[np.ndarray]) -> float:
    ours, theirs = (np.concatenate([part.ravel() for part in parts]) for parts in (gradient, expected))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-300))


@worlds
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_loss_and_gradient_are_those_of_one_process(world: int, target: str, labels: list[int]) -> None:
    loss, gradient, count = reference(target, labels)
    answers = harness.run(world, step_worker, exact, target, labels)
    assert sum(answer["anchors"] for answer in answers) == count
    for answer in answers:
        assert answer["loss"] == pytest.approx(loss, rel=1e-10, abs=1e-12)
        if np.any(gradient[0]):
            assert relative_error(answer["gradient"], gradient) < 1e-10
        else:
            assert not any(part.any() for part in answer["gradient"])


@several
def test_the_batches_leave_the_ranks_with_different_numbers_of_anchors(world: int) -> None:
    uneven, one_without, none = (
        [answer["anchors"] for answer in harness.run(world, step_worker, exact, "none", labels)]
        for labels in LABELS.values()
    )
    assert len(set(uneven)) > 1
    assert min(uneven) > 0
    assert one_without[-1] == 0 < one_without[0]
    assert none == [0] * world


@several
def test_a_masked_target_is_exact_too(world: int) -> None:
    loss, gradient, _ = reference("obdsd", LABELS["uneven"], mask_self=True)
    for answer in harness.run(world, step_worker, exact, "obdsd", LABELS["uneven"], True):
        assert answer["loss"] == pytest.approx(loss, rel=1e-10)
        assert relative_error(answer["gradient"], gradient) < 1e-10


@several
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", [gather_without_gradient, local_loss_only, mean_of_rank_means])
def test_the_usual_shortcuts_are_measurably_wrong(world: int, target: str, way: Way) -> None:
    # An equal number of rows on every rank makes the mean of rank means right for the KL, wrong for the anchors.
    loss, gradient, _ = reference(target, LABELS["uneven"])
    answer = harness.run(world, step_worker, way, target, LABELS["uneven"])[0]
    assert relative_error(answer["gradient"], gradient) > 1e-3
    if way is gather_without_gradient:
        assert answer["loss"] == pytest.approx(loss, rel=1e-10)  # the loss does not show it
    else:
        assert abs(answer["loss"] - loss) > 1e-4


def train_worker(target: str, gather_gradient: bool) -> dict[str, list[np.ndarray]]:
    """Ten optimizer steps under torch's DistributedDataParallel."""
    objective, network = made(target), Embedder(0)
    start = [parameter.detach().clone().numpy() for parameter in network.parameters()]
    student = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    real = collectives.gather_rows
    try:
        if not gather_gradient:
            collectives.gather_rows = lambda x_b: real(x_b.detach())
        for step in range(10):
            terms = local_terms(objective, student, list(LABELS.values())[step % 3], step)
            optimizer.zero_grad()
            objective.loss(terms, global_counts(terms), collectives.world_size(), RAMP).backward()
            optimizer.step()
    finally:
        collectives.gather_rows = real
    return {"start": start, "end": [parameter.detach().numpy() for parameter in network.parameters()]}


@pytest.mark.parametrize("target", TARGETS)
def test_weights_after_ten_steps_of_ddp_are_those_of_one_process(target: str) -> None:
    (one,) = harness.run(1, train_worker, target, True)
    assert relative_error(one["end"], one["start"]) > 1e-2  # they moved
    for world in (2, 3):
        for answer in harness.run(world, train_worker, target, True):
            assert relative_error(answer["end"], one["end"]) < 1e-10
        wrong = harness.run(world, train_worker, target, False)[0]
        assert relative_error(wrong["end"], one["end"]) > 1e-4


def rank_scoped_worker(target: str) -> dict[str, Any]:
    student = Embedder(0)
    loss, _ = exact(made(target, scope="rank"), student, LABELS["no anchor"])
    loss.backward()
    return {"loss": collectives.sum_across(loss).item() / collectives.world_size(), "gradient": mean_gradient(student)}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("target", ["uniform", "psd", "obdsd"])
def test_the_scope_of_a_rank_is_the_mean_over_the_ranks_own_batches(target: str, world: int) -> None:
    student, distillation = Embedder(0), settings(target)
    total, b = torch.zeros((), dtype=torch.double), B // world
    for first in range(0, B, b):
        own = images()[first : first + b]
        names = ("target", "temperature", "transition_temperature", "omega", "mask_self")
        target_bb = oracle.target(
            Embedder(1)(own).detach().numpy(), **{name: getattr(distillation, name) for name in names}
        )
        total = total + oracle.kl(student(own), target_bb, distillation.temperature) / B
    (RAMP * WEIGHT * distillation.temperature**2 * total).backward()
    expected = [p.grad.numpy() for p in student.parameters()]
    for answer in harness.run(world, rank_scoped_worker, target):
        assert relative_error(answer["gradient"], expected) < 1e-10


def test_the_memory_holds_the_latest_rows_of_the_epoch() -> None:
    objective = made("obdsd", memory=20)
    E_BD, labels_B = unit_rows(0).requires_grad_(), torch.tensor(LABELS["uneven"])
    batches = [unit_rows(seed) for seed in (1, 2, 3)]
    masses = []
    for T_BD in batches:
        terms = objective.terms(BatchView(E_BD, E_BD, labels_B, 0), T_BD)
        masses.append(terms["target_dropped_mass"].sum.item())
    assert torch.equal(objective.memory_MD, torch.cat(batches[::-1])[:20])
    assert masses[0] == 0
    assert 0 < masses[1] < masses[2]
    other = made("obdsd", memory=20)
    other.load_state_dict(objective.state_dict(), torch.device("cpu"))
    view = BatchView(E_BD, E_BD, labels_B, 0)
    again, resumed = (o.terms(view, batches[0])["distillation"].sum.item() for o in (objective, other))
    assert again == resumed
    objective.forget()
    fresh = objective.terms(view, batches[0])
    assert fresh["target_dropped_mass"].sum.item() == 0
    assert fresh["distillation"].sum.item() != again


def test_labels_become_indices_among_the_training_classes() -> None:
    classes_C = torch.tensor([3, 5, 8, 100])
    assert objectives.class_indices(torch.tensor([100, 3, 3, 8]), classes_C).tolist() == [3, 0, 0, 2]
    for labels in ([4, 3], [3, 101], [2, 3]):
        unknown = next(label for label in labels if label != 3)
        with pytest.raises(InputError, match=f"class {unknown}, which is no training class"):
            objectives.class_indices(torch.tensor(labels), classes_C)
    with pytest.raises(InputError, match=r"all 2 images of a batch are of class 8; a ranking loss needs two classes"):
        objectives.class_indices(torch.tensor([8, 8]), classes_C)


def test_ramp_and_teacher() -> None:
    objective = made("obdsd")
    assert [objective.ramp(epoch, 4) for epoch in range(4)] == [0, 0.25, 0.5, 0.75]
    assert not objective.needs_teacher(0.0)
    assert objective.needs_teacher(0.25)
    for target in ("none", "uniform"):
        assert not made(target).needs_teacher(0.5)
    assert not made("obdsd", weight=0.0).needs_teacher(0.5)


@pytest.mark.parametrize("target", TARGETS)
def test_terms_and_what_the_loss_takes_of_them(target: str) -> None:
    objective = made(target)
    E_BD = unit_rows(0).requires_grad_()
    terms = objective.terms(BatchView(E_BD, E_BD, torch.tensor(LABELS["uneven"]), 0), unit_rows(1))
    logged = ["target_entropy", "target_kl_to_uniform", "target_self_mass", "target_defects"]
    logged += ["target_residual", "target_iterations"] if target.startswith("obdsd") else []
    assert list(terms) == (["ranking"] if target == "none" else ["ranking", "distillation", *logged])
    assert {name for name, term in terms.items() if term.sum.requires_grad} == set(terms) & {"ranking", "distillation"}
    counts = {name: term.count for name, term in terms.items()}
    ranking = terms["ranking"].sum / counts["ranking"]
    assert torch.equal(objective.loss(terms, counts, 1, 0.0), ranking)
    if target != "none":
        kl = terms["distillation"].sum / B
        assert objective.loss(terms, counts, 1, 0.25).item() == pytest.approx(
            (ranking + 0.25 * 30 * 0.2**2 * kl).item(), rel=1e-14
        )


def test_without_a_teacher_there_is_ranking_alone_and_no_silent_gap() -> None:
    objective = made("psd")
    E_BD = unit_rows(0).requires_grad_()
    terms = objective.terms(BatchView(E_BD, E_BD, torch.tensor(LABELS["uneven"]), 0))
    counts = {name: term.count for name, term in terms.items()}
    assert list(terms) == ["ranking"]
    assert objective.loss(terms, counts, 1, 0.0).isfinite()
    with pytest.raises(InputError, match=r"ramp is 0.5 but the terms hold no distillation; give T_BD"):
        objective.loss(terms, counts, 1, 0.5)


def test_float64_counts_from_the_step_leave_a_float32_loss_in_float32() -> None:
    objective = made("psd")
    E_BD = unit_rows(0).float().requires_grad_()
    terms = objective.terms(BatchView(E_BD, E_BD, torch.tensor(LABELS["uneven"]), 0), unit_rows(1).float())
    loss = objective.loss(terms, {name: term.count.double() for name, term in terms.items()}, 1, 0.5)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("target", ["psd", "obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_reaches_a_sum_on_every_rank(target: str, who: str) -> None:
    objective = made(target)
    rows = {"student": unit_rows(0), "teacher": unit_rows(1)}
    broken = copy.deepcopy(rows)
    broken[who][6, 0] = float("nan")
    for given, finite in ((rows, True), (broken, False)):
        for first in (0, 4, 8):
            view = BatchView(
                given["student"][first : first + 4], given["student"], torch.tensor(LABELS["uneven"]), first
            )
            terms = objective.terms(view, given["teacher"])
            assert all(bool(term.sum.isfinite()) for term in terms.values()) == finite


def test_shapes_that_do_not_fit_are_refused() -> None:
    objective, E_BD = made("psd"), unit_rows(0)
    labels_B = torch.tensor(LABELS["uneven"])
    with pytest.raises(InputError, match=r"labels_B has shape \(4,\); it must be \(12,\)"):
        objective.terms(BatchView(E_BD[:4], E_BD, labels_B[:4], 0), E_BD)
    with pytest.raises(InputError, match=r"T_BD has shape \(4, 6\); it must be \(12, D\)"):
        objective.terms(BatchView(E_BD[:4], E_BD, labels_B, 0), E_BD[:4])
    with pytest.raises(InputError, match="first_row is 10"):
        objective.terms(BatchView(E_BD[:4], E_BD, labels_B, 10), E_BD)
