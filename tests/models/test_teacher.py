import pytest
import torch

from dist_obdsd.config import override_config, parse_config
from dist_obdsd.errors import RunError
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.teacher import ProgressiveTeacher, fingerprints
from tests import harness


def student(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def test_the_teacher_is_last_epochs_student_and_stays_in_eval():
    net = student()
    teacher = ProgressiveTeacher(net)
    with torch.no_grad():
        net[0].weight.add_(1)
        net[1].running_mean.add_(2)
    assert not torch.equal(teacher.network[0].weight, net[0].weight)
    teacher.update(net.train())
    assert torch.equal(teacher.network[0].weight, net[0].weight)
    assert torch.equal(teacher.network[1].running_mean, net[1].running_mean)
    assert teacher.epoch == 1
    assert not teacher.network.training
    x = torch.randn(5, 4)
    assert not teacher(x).requires_grad
    again = ProgressiveTeacher(student(1))
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(x), teacher(x))


def promote_on_ranks(differ: bool) -> str:
    net = student()
    teacher = ProgressiveTeacher(net)
    if differ and torch.distributed.get_rank() == 1:
        with torch.no_grad():
            net[1].bias[0] += 2.0**-20
    try:
        teacher.update(net)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_teacher_that_differs_on_one_rank_stops_all_with_its_name(world_size):
    assert harness.run(world_size, promote_on_ranks, False) == [""] * world_size
    for message in harness.run(world_size, promote_on_ranks, True):
        assert "1 tensors (1.bias)" in message


@pytest.mark.parametrize("backbone", ["small_cnn", "resnet18", "squeezenet1_0"])
def test_fingerprints_are_of_values_whatever_the_layout(backbone):
    """Kernels of 1 x 1 are contiguous by name in either layout, and have other strides."""
    prints = []
    for layout in ("true", "false"):
        raw = {"name": "x", "epochs": 2, "data": {"shards": "x"}, "model": {"backbone": backbone}}
        config = parse_config(override_config(raw, [f"model.channels_last={layout}"]), "x")
        net = build_embedder(config, torch.device("cpu"))
        ProgressiveTeacher(net).update(net)
        prints.append(fingerprints(net))
    assert prints[0] == prints[1]
    with torch.no_grad():
        next(net.parameters()).flatten()[3] += 1
    assert fingerprints(net) != prints[1]
