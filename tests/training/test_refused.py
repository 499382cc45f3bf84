"""Checkpoints that do not belong to a run, and ranks that do not belong together: refused by all, with what differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import assert_same_config
from tests import harness, runs


def without_a_weight(state: dict[str, Any]) -> dict[str, Any]:
    del state["student"]["head.weight"]
    return state


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A working folder with a run that stopped after two steps."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))
    runs.train(folder, "max_steps=2")
    return folder


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "step-00000002.pt is not a readable checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "step-00000002.pt has format None"),
        (lambda path: torch.save(without_a_weight(torch.load(path)), path), '"head.weight"'),
    ],
    ids=["cut short", "of another program", "of another network"],
)
def test_a_checkpoint_that_is_not_the_run_s_is_refused(train, folder, stopped, spoil, fact):
    shutil.copytree(stopped / "runs", folder / "runs")
    spoil(folder / "runs" / "tiny" / "checkpoints" / "step-00000002.pt")
    code, _, err = train()
    assert code == 2
    (line,) = err.splitlines()
    assert fact in line


@pytest.mark.parametrize(
    ("overrides", "fact"),
    [
        (("optim.lr=0.5", "epochs=4"), "(epochs: 3 -> 4; optim.lr: 0.001 -> 0.5)"),
        (("data.workers=1", "threads=2", "max_steps=2"), None),
    ],
    ids=["rates", "what may change"],
)
def test_other_settings_are_refused_by_name_and_value(train, folder, stopped, overrides, fact):
    shutil.copytree(stopped / "runs", folder / "runs")
    code, _, err = train(*overrides)
    assert code == (2 if fact else 0)
    assert (fact or "") in err


def settings_worker(found: list[dict[str, Any]]) -> None:
    assert_same_config(found[collectives.rank()])


def test_different_settings_are_told_by_name_value_and_rank():
    alike = {"lr": 0.1, "names": ["a", "b"], "seed": None}
    harness.run(3, settings_worker, [alike] * 3)
    with pytest.raises(AssertionError) as told:
        harness.run(3, settings_worker, [alike, alike | {"names": ["a"]}, {"lr": 0.1, "names": ["a", "b"]}])
    differs = 'names is ["a", "b"] on ranks 0, 2, ["a"] on rank 1; seed is null on ranks 0, 1, not set on rank 2'
    assert f"({differs})" in str(told.value)


WITHOUT_A_GPU = """
import torch
from dist_obdsd.cli import main as cli
from dist_obdsd.distributed import launch
launch.choose_device = lambda *_: torch.device("meta")  # stands for any other device
cli.program()
"""


@pytest.mark.parametrize(
    ("of_rank_1", "code", "sentence"),
    [
        ("optim.lr=0.5", None, "(optim.lr is 0.001 on rank 0, 0.5 on rank 1)"),
        ("optim.rate=0.5", None, "reading the config failed on rank 1: tiny.yaml: unknown setting optim.rate"),
        ("seed=0", WITHOUT_A_GPU, '(device is "cpu" on rank 0, "meta" on rank 1)'),
    ],
)
def test_a_rank_that_was_started_differently_ends_all_at_once(folder, of_rank_1, code, sentence):
    arguments = [["timeout_seconds=3600"], ["timeout_seconds=3600", of_rank_1]]
    codes, said = runs.two_ranks(folder, arguments, [None, code])
    assert codes == [2, 2], said  # nobody waits for the other
    assert sentence in said[0]
    assert said[1] == ""  # by one of them
    assert not (folder / "runs").exists()
