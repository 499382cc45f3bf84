"""The whole objective: W processes give the loss, the gradient and, after 10 steps, the weights of one."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, UserError
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.losses.obdsd import OBDSDLoss, class_indices
from dist_obdsd.losses.proxy_anchor import ProxyAnchorLoss
from tests import harness, oracle
from tests.losses.data import BATCHES, WAYS, Embedder, backward, flat, images, own_rows, patched, relative_error
from tests.manifold.data import B, unit_rows
from tests.shadow import Shadow

TARGETS = ("none", "uniform", "psd", "obdsd", "obdsd_symmetric")
UNEVEN = BATCHES["uneven"]
RAMP, WEIGHT = 0.5, 30.0
SETTINGS = {"temperature": 0.2, "transition_temperature": 0.1, "omega": 0.7}


def made(target: str, **more: Any) -> OBDSDLoss:
    return OBDSDLoss(MultiSimilarityLoss(), target=target, **{"weight": WEIGHT, **SETTINGS, **more})


def own_loss(
    objective: OBDSDLoss, student: nn.Module, labels: list[int], way: str = "exact", step: int = 0
) -> torch.Tensor:
    own = own_rows()
    own_bF, labels_b = images(step)[own], torch.tensor(labels)[own]
    with patched(way):
        return objective(student(own_bF), labels_b, Embedder(1)(own_bF).detach(), ramp=RAMP).loss


def step_worker(way: str, target: str, mask_self: bool = False) -> dict[str, dict[str, Any]]:
    answers = {}
    for kind, labels in BATCHES.items():
        student = Embedder(0)
        answers[kind] = backward(own_loss(made(target, mask_self=mask_self), student, labels, way), student)
    return answers


def reference(target: str, labels: list[int], mask_self: bool = False) -> tuple[float, np.ndarray]:
    """Loss and gradient of one process without a process group, from double loops and an explicit inverse."""
    student, ranking = Embedder(0), MultiSimilarityLoss()
    E_BD, T_BD = student(images()), Embedder(1)(images()).detach()
    published = {name: getattr(ranking, name) for name in ("alpha", "beta", "threshold", "margin")}
    total, count = oracle.multi_similarity(E_BD, labels, **published)
    loss = total / max(count, 1)
    if target != "none":
        target_BB = oracle.target(T_BD.numpy(), target=target, mask_self=mask_self, **SETTINGS)
        kl = oracle.kl(E_BD, target_BB, SETTINGS["temperature"]) / B
        loss = loss + RAMP * WEIGHT * SETTINGS["temperature"] ** 2 * kl
    loss.backward()
    return loss.item(), flat(p.grad for p in student.parameters())


@pytest.mark.parametrize("world", harness.WORLD_SIZES)
@pytest.mark.parametrize("target", [*TARGETS, "obdsd, masked"])
def test_loss_and_gradient_are_those_of_one_process(world: int, target: str) -> None:
    target, _, masked = target.partition(",")
    answers = harness.run(world, step_worker, "exact", target, bool(masked))
    for kind, labels in BATCHES.items():
        loss, gradient = reference(target, labels, bool(masked))
        for answer in (answers[kind] for answers in answers):
            assert answer["loss"] == pytest.approx(loss, rel=1e-10, abs=1e-12)
            if gradient.any():
                assert relative_error(answer["gradient"], gradient) < 1e-10
            else:
                assert not answer["gradient"].any()


@pytest.mark.parametrize("target", ["none", "psd", "obdsd"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "exact"])
def test_the_usual_shortcuts_are_measurably_wrong(target: str, way: str) -> None:
    # An equal number of rows on every rank makes the mean of rank means right for the KL, wrong for the anchors.
    loss, gradient = reference(target, UNEVEN)
    answer = harness.run(3, step_worker, way, target)[0]["uneven"]
    assert relative_error(answer["gradient"], gradient) > 1e-3
    if way == "no gradient":
        assert answer["loss"] == pytest.approx(loss, rel=1e-10)  # the loss does not show it
    else:
        assert abs(answer["mean"] - loss) > 1e-4


def train_worker(wrapper: str = "ddp", way: str = "exact") -> np.ndarray:
    """The weights after ten optimizer steps; by "accumulated", after such steps of two batches each."""
    objective, student = made("obdsd"), Embedder(0)
    network: Any = student
    if wrapper == "fsdp":
        fully_shard(student, mesh=init_device_mesh("cpu", (collectives.world_size(),)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    if wrapper == "deepspeed":
        network = engine(student, optimizer)
    elif wrapper != "fsdp":
        network = DistributedDataParallel(student)
    for step in range(10):
        if wrapper == "accumulated":
            with network.no_sync():
                own_loss(objective, network, UNEVEN, way, step + 100).backward()
        loss = own_loss(objective, network, list(BATCHES.values())[step % 3], way, step)
        if wrapper == "deepspeed":
            network.backward(loss)
            network.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return flat(p.full_tensor() if wrapper == "fsdp" else p for p in student.parameters())


def engine(student: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's, at ZeRO stage 2."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # which would be compiled
    os.environ.setdefault("LOCAL_RANK", str(collectives.rank()))
    options = {
        "train_micro_batch_size_per_gpu": B // 2, "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,  # its default clips at 1
    }  # fmt: skip
    return deepspeed.initialize(model=student, optimizer=optimizer, config=options, dist_init_required=False)[0]


@pytest.mark.parametrize(
    ("wrapper", "worlds"), [("ddp", (2, 3)), ("accumulated", (2,)), ("fsdp", (2,)), ("deepspeed", (2,))]
)
def test_weights_after_ten_steps_are_those_of_one_process(wrapper: str, worlds: tuple[int, ...]) -> None:
    start = flat(Embedder(0).parameters())
    (one,) = harness.run(1, train_worker, "accumulated" if wrapper == "accumulated" else "ddp")
    assert relative_error(one, start) > 1e-2  # they moved
    for world in worlds:
        for end in harness.run(world, train_worker, wrapper):
            assert relative_error(end, one) < (1e-6 if wrapper == "deepspeed" else 1e-10)  # in float32
    assert relative_error(harness.run(2, train_worker, wrapper, "no gradient")[0], one) > 1e-4


def subgroup_worker(target: str) -> dict[str, Any] | None:
    """The first two of three ranks share a batch; the third takes no part."""
    group = torch.distributed.new_group([0, 1])
    if torch.distributed.get_rank() == 2:
        return None
    with collectives.within(group):
        rows = own_rows()
    student, own_bF = Embedder(0), images()[rows]
    T_bD = Embedder(1)(own_bF).detach()
    out = made(target, group=group)(student(own_bF), torch.tensor(UNEVEN)[rows], T_bD, ramp=RAMP)
    with collectives.within(group):
        return backward(out.loss, student)


def test_a_subgroup_is_exact_by_itself() -> None:
    loss, gradient = reference("obdsd", UNEVEN)
    *answers, outside = harness.run(3, subgroup_worker, "obdsd")
    assert outside is None
    for answer in answers:
        assert answer["loss"] == pytest.approx(loss, rel=1e-10)
        assert relative_error(answer["gradient"], gradient) < 1e-10


BAD: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "nothing": (lambda rank, E, labels, T: (E, labels, T), []),
    "sizes": (
        lambda rank, E, labels, T: (E[rank:], labels[rank:], T[rank:]), ["(4, 6)", "(3, 6)", "rank 1", "drop_last"]
    ),
    "label type": (lambda rank, E, labels, T: (E, labels.float(), T), ["float32", "int64", "(4,)"]),
    "one label type": (lambda rank, E, labels, T: (E, labels.int() if rank else labels, T), ["int32 on rank 1"]),
    "no rows": (lambda rank, E, labels, T: (E[:0], labels[:0], T[:0]), ["(0, 6)", "at least one"]),
    "label range": (lambda rank, E, labels, T: (E, labels + 2 * rank, T), ["2 labels", "0 to 2", "more than 3"]),
    "negative labels": (lambda rank, E, labels, T: (E, labels - 1, T), ["4 labels", "from 0"]),
    "lengths": (lambda rank, E, labels, T: (E * (3 - 2 * rank), labels, T), ["4 rows", "length 1", "normalize=True"]),
    "teacher's lengths": (lambda rank, E, labels, T: (E, labels, T * 3), ["teacher's batch", "8 rows"]),
    "no teacher": (lambda rank, E, labels, T: (E, labels, None), ["teacher_bD", "ramp=0"]),
    "other teacher": (lambda rank, E, labels, T: (E, labels, T[:2]), ["2 rows", "student 4"]),
}  # fmt: skip
"""What is wrong -> how, and the facts of the message."""


def refused_worker(kind: str) -> str:
    rank, (change, _) = torch.distributed.get_rank(), BAD[kind]
    objective = OBDSDLoss(ProxyAnchorLoss(classes=3, embedding_dim=6), target="psd")
    E_bD, labels_b, T_bD = unit_rows(rank, 4).requires_grad_(), torch.tensor([0, 0, 1, 1]), unit_rows(5, 4)
    try:
        objective(*change(rank, E_bD, labels_b, T_bD))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_batch_is_refused_on_every_rank(kind: str) -> None:
    _, facts = BAD[kind]
    for message in harness.run(2, refused_worker, kind):
        assert all(fact in message for fact in facts), message
        assert bool(message) == bool(facts)


def whole_batch() -> BatchView:
    E_BD = unit_rows(0).requires_grad_()
    return BatchView(E_BD, E_BD, torch.tensor(UNEVEN), 0)


def test_a_refused_batch_leaves_nothing_behind() -> None:
    objective, E_BD, labels_B = made("psd"), unit_rows(0), torch.tensor(UNEVEN)
    with pytest.raises(InputError, match="labels are torch.float32"):
        objective(E_BD, labels_B.float(), unit_rows(1) * 3)  # its teacher's rows are too long, too
    assert objective(E_BD, labels_B, unit_rows(1)).loss > 0


def test_normalize_takes_rows_of_any_length() -> None:
    E_BD, T_BD, labels_B = unit_rows(0), unit_rows(1), torch.tensor(UNEVEN)
    scales_B1 = torch.linspace(0.1, 9, B, dtype=torch.float64)[:, None]
    expected = made("obdsd")(E_BD, labels_B, T_BD).loss.item()
    found = made("obdsd", normalize=True)(E_BD * scales_B1, labels_B, T_BD * 5).loss.item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_any_module_of_a_whole_batch_can_be_the_ranking_loss() -> None:
    class Spread(nn.Module):
        def forward(self, E_BD: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
            return (E_BD @ E_BD.T).mean(1)

    E_BD = unit_rows(0).requires_grad_()
    objective = OBDSDLoss(Spread(), target="none")
    out = objective(E_BD, torch.tensor(UNEVEN))
    assert out.loss.item() == pytest.approx((E_BD @ E_BD.T).mean(1).sum().item(), rel=1e-12)
    assert list(out.metrics) == ["ranking", "anchors"]
    torch.no_grad()(objective)(E_BD, torch.tensor(UNEVEN))
    objective.eval()(E_BD, torch.tensor(UNEVEN))
    assert objective.ranking.calls == 1  # a validation changes nothing that training draws


@pytest.mark.parametrize(
    ("name", "value"),
    [("omega", 1.0), ("temperature", 0), ("target", "x"), ("scope", "node"), ("neighbours", 0), ("solver", "x")],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is {value!r}"):
        OBDSDLoss(MultiSimilarityLoss(), **{name: value})


def rank_scoped_worker(target: str) -> np.ndarray:
    student = Embedder(0)
    return backward(own_loss(made(target, scope="rank"), student, BATCHES["no anchor"]), student)["gradient"]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("target", ["psd", "obdsd"])
def test_the_scope_of_a_rank_is_the_mean_over_the_ranks_own_batches(target: str, world: int) -> None:
    student = Embedder(0)
    total, b = torch.zeros((), dtype=torch.double), B // world
    for first in range(0, B, b):
        own = images()[first : first + b]
        target_bb = oracle.target(Embedder(1)(own).detach().numpy(), target=target, mask_self=False, **SETTINGS)
        total = total + oracle.kl(student(own), target_bb, SETTINGS["temperature"]) / B
    (RAMP * WEIGHT * SETTINGS["temperature"] ** 2 * total).backward()
    expected = flat(p.grad for p in student.parameters())
    for answer in harness.run(world, rank_scoped_worker, target):
        assert relative_error(answer, expected) < 1e-10


def test_the_memory_holds_the_latest_rows_of_the_epoch() -> None:
    objective, other = made("obdsd", memory=20), made("obdsd", memory=20)
    view, batches = whole_batch(), [unit_rows(seed) for seed in (1, 2, 3)]
    masses = [objective.terms(view, T_BD)["target_dropped_mass"].sum.item() for T_BD in batches]
    assert torch.equal(objective.memory_MD, torch.cat(batches[::-1])[:20])
    assert masses[0] == 0 < masses[1] < masses[2]
    other.load_state_dict(objective.state_dict())
    again, resumed = (o.terms(view, batches[0])["distillation"].sum.item() for o in (objective, other))
    assert again == resumed
    objective.reset_memory()
    other.load_state_dict(load(save(objective.state_dict())))  # as Accelerate keeps a module, without None
    fresh, _ = (o.terms(view, batches[0]) for o in (objective, other.eval()))
    assert other.memory_MD is None  # nor does a validation fill it
    assert fresh["target_dropped_mass"].sum.item() == 0
    assert fresh["distillation"].sum.item() != again


def test_labels_become_indices_among_the_training_classes() -> None:
    classes_C = torch.tensor([3, 5, 8, 100])
    assert class_indices(torch.tensor([100, 3, 3, 8]), classes_C).tolist() == [3, 0, 0, 2]
    for labels, fact in (([4, 3], "class 4, which"), ([3, 101], "class 101, which"), ([8, 8], "all 2 .* of class 8")):
        with pytest.raises(InputError, match=fact):
            class_indices(torch.tensor(labels), classes_C)


@pytest.mark.parametrize("target", TARGETS)
def test_terms_and_what_the_loss_takes_of_them(target: str) -> None:
    objective, view = made(target), whole_batch()
    terms = objective.terms(view, unit_rows(1))
    logged = ["target_entropy", "target_kl_to_uniform", "target_self_mass", "target_defects"]
    logged += ["target_residual", "target_iterations"] if target.startswith("obdsd") else []
    assert list(terms) == (["ranking"] if target == "none" else ["ranking", "distillation", *logged])
    assert {name for name, term in terms.items() if term.sum.requires_grad} == set(terms) & {"ranking", "distillation"}
    ranking = (terms["ranking"].sum / terms["ranking"].count).item()
    assert objective(view.E_BD, view.labels_B, unit_rows(1), ramp=0).loss.item() == ranking
    out = objective(view.E_BD, view.labels_B, unit_rows(1), ramp=0.25)
    assert list(out.metrics) == [*terms, "anchors"]
    assert objective.needs_teacher(0.25) == (target not in ("none", "uniform"))
    assert not objective.needs_teacher(0.0)
    if target != "none":
        kl = (terms["distillation"].sum / B).item()
        assert out.loss.item() == pytest.approx(ranking + 0.25 * 30 * 0.2**2 * kl, rel=1e-14)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("target", ["none", "uniform", "psd"])
def test_the_checks_wait_for_no_device(target: str, normalize: bool) -> None:
    objective = made(target, normalize=normalize)
    E_BD, T_BD, labels_B = unit_rows(0).float().requires_grad_(), unit_rows(1).float(), torch.tensor(UNEVEN)
    with Shadow([E_BD, T_BD, labels_B]) as shadow:
        for _ in range(2):
            objective(E_BD, labels_B, T_BD).loss.backward()
    assert not shadow.found
    assert shadow.looks == 2  # at what the step before had to say, once a step
