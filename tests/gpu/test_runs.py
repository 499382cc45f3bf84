"""Whole runs and evaluations on a device."""

import importlib.util
import warnings

import pytest
import torch
from torch.nn import functional

from dist_obdsd import checkpoint
from dist_obdsd.distributed import launch
from dist_obdsd.evaluation.evaluator import measure
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.metric_parts import Settings
from dist_obdsd.training.checkpoint_manager import CheckpointManager
from tests.gpu.rig import CPU, distance, same_bits, within

METRICS = ["recall", "map@r", "r_precision", "map@c", "f1", "distances", "rho_spectrum"]
if importlib.util.find_spec("sklearn") is not None:  # which a machine with a GPU may lack
    METRICS.append("nmi")
ROUNDING = 1e-3
"""How far a resumed run's weights may be off where no two runs give the same bits, relative to their norm."""


def test_a_resumed_run_is_the_same(device, train, folder):
    """Stopped by ``max_steps`` inside an epoch and started again: the weights of a run that was not stopped.

    The same bits, where the device gives one run's bits again. A GPU may not, even when torch is asked for
    deterministic kernels, since some backward passes have none; then two runs of which none was stopped say how far
    apart such runs are, and the resumed one must be as near.
    """
    common = (f"device={device.type}", "precision=float32", "optim.name=sgd", "optim.lr=0.01", "evaluation.test=false")
    ways = {"whole": [[]], "again": [[]], "resumed": [["max_steps=5"], ["max_steps=7"], []], "other": [["seed=1"]]}
    weights = {}
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # where torch has no such kernel
            for way, attempts in ways.items():
                for more in attempts:
                    code, _, errors = train(f"name={way}", *common, *more)
                    assert code == 0, errors
                weights[way] = checkpoint.load(folder / "runs" / way)["student"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert distance(weights["other"], weights["whole"]) > 100 * ROUNDING  # the control
    if not same_bits(weights["resumed"], weights["whole"]):
        assert not same_bits(weights["again"], weights["whole"]), "only the resumed run ends elsewhere"
        print(f"this device does not repeat its bits: {distance(weights['again'], weights['whole']):.1e}")
        within("distance of the resumed run", distance(weights["resumed"], weights["whole"]), ROUNDING)


def test_a_resumed_run_that_forgets_is_found(train, folder, monkeypatch):
    load_state_dict = CheckpointManager._load_state_dict
    monkeypatch.setattr(
        CheckpointManager, "_load_state_dict", lambda self, state: load_state_dict(self, state | {"optimizer": {}})
    )
    with pytest.raises(AssertionError, match="only the resumed run ends elsewhere"):
        test_a_resumed_run_is_the_same(CPU, train, folder)


@pytest.mark.parametrize("distance_of", ["cosine", "euclidean"])
def test_an_evaluation_is_the_same(device, distance_of):
    """All metrics of the same embeddings, searched on the CPU and, in another order, on the device: the same bits."""
    n = 600 if device.type == "cpu" else 3000
    draw = torch.Generator().manual_seed(0)
    labels_n = torch.arange(n) // 6
    centres = torch.randn(n // 6, 48, generator=draw).repeat_interleave(6, 0)
    rows_nD = unit_rows(functional.normalize(centres + 2 * torch.randn(n, 48, generator=draw), dim=1))
    rows_nD[1::3] = rows_nD[::3]  # ties, which ids decide
    settings = Settings(METRICS, (1, 10, 100), backend="torch", distance=distance_of)
    with launch.start(device.type):
        wanted, found = (
            measure(rows_nD[order_n], order_n, labels_n[order_n], ["both"] * n, settings, device=where).metrics
            for where, order_n in ((CPU, torch.arange(n)), (device, torch.randperm(n, generator=draw)))
        )
    assert found == wanted
