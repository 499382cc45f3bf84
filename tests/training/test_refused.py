"""Checkpoints that do not belong to a run, and ranks that do not belong together: refused by all, with what differs."""

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import assert_same_config
from dist_obdsd.errors import InputError
from tests import harness, runs
from tests.nursery import Program


class Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def write(data: bytes) -> bytes:
        Path("whole.pt").write_bytes(data)
        torch.save(change(torch.load("whole.pt", weights_only=True)), "changed.pt")
        return Path("changed.pt").read_bytes()

    return write


def without_a_weight(state: dict[str, Any]) -> dict[str, Any]:
    del state["student"]["head.weight"]
    return state


def test_a_checkpoint_that_is_not_the_run_s_own_is_refused_with_what_differs(train):
    assert train("max_steps=2")[0] == 0
    (path,) = Path("runs/tiny/checkpoints").glob("*.pt")
    whole = path.read_bytes()
    unreadable = "is not a readable checkpoint: "
    for name, spoil, sentence in (
        ("empty", lambda data: b"", unreadable + "it is cut short or another kind of file"),
        ("cut short", cut, unreadable + "it is cut short"),
        ("damaged", damaged, " in it is damaged; take an earlier one"),
        ("of another program", rewritten(lambda state: {"state_dict": {}}), "has format None but this program reads"),
        ("a pickle", lambda data: pickle.dumps(Executes()), unreadable + "it is cut short or another kind"),
        ("with code", rewritten(lambda state: state | {"x": Executes()}), "which would have to be executed; take"),
        ("another network", rewritten(without_a_weight), 'Missing key(s) in state_dict: "head.weight"'),
    ):
        path.write_bytes(spoil(whole))
        code, _, said = train()
        assert code == 2, name
        (line,) = said.splitlines()
        assert sentence in line, name
        assert path.name in line or "runs/tiny" in line, name
    assert not Path("executed").exists()
    assert pickle.loads(pickle.dumps(Executes())) is None
    assert Path("executed").exists()  # the control: whoever unpickles it executes it

    path.write_bytes(whole)
    for overrides, sentence in (
        (("optim.lr=0.5", "epochs=4"), "(epochs: 3 -> 4; optim.lr: 0.001 -> 0.5); use those"),
        (("model.embedding_dim=32",), "(model.embedding_dim: 16 -> 32)"),
        (
            ("model.backbone=resnet18", "data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"),
            "small_cnn -> resnet18",
        ),
    ):
        code, _, said = train(*overrides)
        assert code == 2
        assert sentence in said.splitlines()[-1]
    code, _, said = train("data.workers=1", "threads=2", "max_steps=2")  # what may change
    assert code == 0


def settings_worker(found: list[dict[str, Any]]) -> str:
    try:
        assert_same_config(found[collectives.rank()])
    except InputError as error:
        return str(error)
    return "agreed"


def test_different_settings_are_told_by_name_value_and_rank():
    alike = {"lr": 0.1, "names": ["a", "b"], "seed": None}
    assert harness.run(3, settings_worker, [alike] * 3) == ["agreed"] * 3
    one, other = alike | {"names": ["a"]}, {"lr": 0.1, "names": ["a", "b"]}
    answers = harness.run(3, settings_worker, [alike, one, other])
    assert len(set(answers)) == 1
    assert (
        'names is ["a", "b"] on ranks 0, 2, ["a"] on rank 1; seed is null on ranks 0, 1, not set on rank 2'
        in answers[0]
    )
    assert "lr is" not in answers[0]


@pytest.mark.parametrize(
    ("of_rank_1", "sentence"),
    [
        ("optim.lr=0.5", "(optim.lr is 0.001 on rank 0, 0.5 on rank 1)"),
        ("optim.rate=0.5", "reading the config failed on rank 1: tiny.yaml: unknown setting optim.rate"),
    ],
)
def test_a_rank_that_was_started_differently_ends_all_at_once(folder, of_rank_1, sentence):
    started = time.monotonic()
    logs = [folder / "0.log", folder / "1.log"]
    processes = []
    for log, env, more in zip(logs, runs.group_environments(2), ([], [of_rank_1]), strict=True):
        with log.open("wb") as err, open(os.devnull, "wb") as out:
            arguments = ["train", "tiny.yaml", *more]
            processes.append(Program(arguments, cwd=folder, env=runs.environment(env), stdout=out, stderr=err))
    codes = [process.wait(timeout=60) for process in processes]
    assert time.monotonic() - started < 60  # the config's timeout_seconds: nobody waited for it
    said = [log.read_text() for log in logs]
    assert codes == [2, 2], said
    assert sentence in said[0]
    assert said[1] == ""  # by one of them
    assert not (folder / "runs").exists()
