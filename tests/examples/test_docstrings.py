"""The worked example in every public docstring runs."""

import doctest

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dist_obdsd

NAMES = [name for name in dist_obdsd.__all__ if name != "__version__"]


class Unit(nn.Linear):
    def forward(self, images):
        return nn.functional.normalize(super().forward(images), dim=1)


@pytest.fixture
def names(trained, tmp_path, monkeypatch):
    """What a reader has at hand, in a folder with data and a run."""
    torch.manual_seed(0)
    for link, target in (
        ("data/badges", "packed"), ("runs/photos", "runs/tiny"), ("a.png", "images/class_00/0.png"),
        ("b.png", "images/class_01/0.png"),
    ):  # fmt: skip
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(trained / target)
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(4, 12).repeat_interleave(2, 0), torch.arange(4).repeat_interleave(2)
    dataset = TensorDataset(images.repeat(4, 1), labels.repeat(4))
    dataset.targets = labels.repeat(4).tolist()
    student = Unit(12, 16)
    public = {name: getattr(dist_obdsd, name) for name in NAMES}
    return public | {
        "student": student, "images": images, "labels": labels, "batches": [(images, labels)] * 2, "dataset": dataset,
        "embeddings": student(images).detach().requires_grad_(), "DataLoader": DataLoader,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, names):
    (example,) = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=names)
    assert example.examples
    said = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
