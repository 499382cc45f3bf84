import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.models.teacher import ProgressiveTeacher, fingerprints
from tests import harness


def student(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def test_it_is_saved_and_follows_the_student_only_when_told():
    parent, again = torch.nn.Module(), torch.nn.Module()
    for module in (parent, again):
        module.student = student()
        module.teacher = ProgressiveTeacher(module.student)
    before = fingerprints(parent.teacher)
    parent.train()
    parent.requires_grad_()
    optimizer = torch.optim.AdamW(parent.parameters(), 0.1, weight_decay=0.5)
    (parent.student(torch.randn(5, 4)) - parent.teacher(torch.randn(5, 4))).square().mean().backward()
    optimizer.step()
    assert fingerprints(parent.teacher) == before
    assert not parent.teacher.network.training
    assert not parent.teacher(torch.eye(4)).requires_grad
    parent.teacher.update(parent.student)
    assert fingerprints(parent.teacher.network) == fingerprints(parent.student)
    again.load_state_dict(parent.state_dict())
    assert again.teacher.epoch == 1
    assert fingerprints(again.teacher) == fingerprints(parent.teacher) != before
    assert parent.to(torch.float64).teacher.network[0].weight.dtype == torch.float64


def update_when_wrapped(how: str) -> bool:
    """Tell if the teacher's rows are the student's after an update through a wrapper."""
    net = student()
    teacher = ProgressiveTeacher(net)
    wrapped = DistributedDataParallel(net) if how == "ddp" else torch.compile(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
        net[1].running_mean.add_(2)
    teacher.update(wrapped)
    return torch.equal(teacher(torch.eye(4)), net.eval()(torch.eye(4)))


@pytest.mark.parametrize("how", ["ddp", "compiled"])
def test_it_follows_a_wrapped_student(how):
    assert harness.run(2, update_when_wrapped, how) == [True, True]


def test_another_network_is_refused_by_the_names_that_differ():
    teacher = ProgressiveTeacher(student())
    with pytest.raises(InputError, match=r"2\.weight"):
        teacher.update(torch.nn.Sequential(*student(), torch.nn.Linear(3, 3)))


def promote_on_ranks() -> None:
    net = student()
    teacher = ProgressiveTeacher(net)
    teacher.update(net)
    with torch.no_grad():
        net[1].bias[0] += 2.0**-20 * torch.distributed.get_rank()
    with pytest.raises(RunError, match=r"1 tensors \(1.bias\)"):
        teacher.update(net)


def test_a_teacher_that_differs_on_one_rank_stops_all_with_its_name():
    harness.run(2, promote_on_ranks)
