"""Steps on a device that is not there, and a budget of kernel launches for each target."""

from typing import Any

import pytest

from tests.gpu import fake

OBDSD, SYMMETRIC = "distillation.target=obdsd", "distillation.target=obdsd_symmetric"
LARGE = [OBDSD, "distillation.memory_gib=58"]
REJECTED = {"rejected": True}
CG = REJECTED | {"iterations": 10}
BUDGET: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "none": ({"overrides": ["distillation.target=none"]}, 66, 20, 1),
    "psd": ({"overrides": ["distillation.target=psd"]}, 101, 35, 2),
    "obdsd, first step": ({"overrides": [OBDSD]}, 164, 133, 12),
    "obdsd": ({"overrides": [OBDSD], "plan": {"products": 3}}, 124, 96, 12),
    "obdsd, rejected": ({"overrides": [OBDSD], "plan": REJECTED}, 133, 120, 12),
    "obdsd, corrected": ({"overrides": [OBDSD], "plan": REJECTED | {"corrections": 1}}, 147, 136, 12),
    "obdsd, cg on 64 ranks": ({"overrides": [OBDSD], "plan": CG, "W": 64}, 212, 7076, 789),
    "symmetric": ({"overrides": [SYMMETRIC], "plan": {"products": 5}}, 139, 100, 7),
    "symmetric, rejected": ({"overrides": [SYMMETRIC], "plan": REJECTED}, 135, 117, 10),
    "57,344 images": ({"overrides": LARGE, "W": 512}, 164, 292557, 50215),
    "57,344 images, cg": ({"overrides": LARGE, "W": 512, "plan": CG}, 212, 407840, 50215),
}
"""Launches of the objective's forward and backward at 112 rows of 8 ranks, MiB that they read and write, and MiB held
at most, with what goes in. Whoever passes one says why, here."""
STEPS: dict[str, dict[str, Any]] = {
    **{f"{W} ranks": {"W": W, "overrides": LARGE} for W in (1, 8, 64, 512)},
    **{f"{W} ranks, rejected": {"W": W, "plan": CG} for W in (1, 64)},
    "fsdp": {"overrides": ["strategy=fsdp"]},
}
"""Whole steps; the shadow looks at those of every loss, target and option."""
# Where no matrix is kept, the solver looks at every iteration.
WAITS = {"a host read": {"overrides": [OBDSD, "distillation.memory_gib=1e-9"]}}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """The answers, from one process."""
    jobs = [{"of": fake.objective} | job for job, *_ in BUDGET.values()]
    return dict(zip([*BUDGET, *STEPS, *WAITS], fake.answers([*jobs, *STEPS.values(), *WAITS.values()]), strict=True))


@pytest.mark.parametrize("name", BUDGET)
def test_the_objective_keeps_its_budget(found, name):
    _, *budget = BUDGET[name]
    for figure, most in zip(("launches", "moved_mib", "peak_mib"), budget, strict=True):
        assert 0.9 * most - 2 < found[name][figure] <= most, figure  # a budget that is far off guards nothing


@pytest.mark.parametrize("name", STEPS)
def test_no_step_reads_a_number_or_mixes_devices(found, name):
    assert "error" not in found[name]


def test_a_sharded_step_sends_more_messages(found):
    assert found["fsdp"]["messages"] > found["8 ranks"]["messages"]


def test_a_host_read_is_found(found):
    assert "DataDependent" in found["a host read"]["error"]
