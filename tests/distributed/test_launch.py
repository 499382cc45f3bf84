import logging
import os
import socket

import pytest

from dist_obdsd.distributed import launch
from dist_obdsd.distributed.launch import Launch, choose_device, read_launch, restart_trap
from dist_obdsd.errors import InputError, RunError
from tests.runs import free_port

VARIABLES = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_launchers_that_set_the_four_variables():
    for launcher, mark in {
        "torchrun": {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"},
        "deepspeed": {"CROSS_RANK": "1", "LOCAL_SIZE": "2"},
        "environment": {"LOCAL_WORLD_SIZE": "2"},
    }.items():
        assert read_launch(VARIABLES | mark) == Launch(launcher, 3, 4, 1, 2, ("a", 29500))


def test_srun_on_two_nodes():
    env = {
        "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345",
        "SLURM_STEP_NODELIST": "gpu[03-04],cpu1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }  # fmt: skip
    assert read_launch(env) == Launch("srun", 5, 8, 1, 4, ("gpu03", 32345))
    # torchrun started by srun decides, since it numbers the processes that it made.
    assert read_launch(env | VARIABLES | {"TORCHELASTIC_RUN_ID": "x"}).rank == 3
    # A plain process is a world of one, also in an interactive allocation without srun.
    assert read_launch({}) == Launch("single")
    assert read_launch({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == Launch("single")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"MASTER_PORT": None}, "MASTER_PORT is not"), ({"RANK": "x"}, "no number"),
     ({"RANK": None, "WORLD_SIZE": None, "SLURM_STEP_ID": "1", "SLURM_NTASKS": "x"}, "no number"),
     ({"RANK": "4"}, "rank 4 is not within the world size 4")],
)  # fmt: skip
def test_a_broken_environment_is_refused(change, sentence):
    env = {name: value for name, value in (VARIABLES | change).items() if value is not None}
    with pytest.raises(InputError, match=sentence):
        read_launch(env)


def test_a_store_that_outlives_its_ranks_is_told():
    env = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (restart_trap(env) or "")
    for change in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}):
        assert restart_trap(env | change) is None


def test_every_rank_of_a_node_gets_the_same_kind_of_device():
    one, second_of_two = Launch("single"), Launch("torchrun", 1, 2, 1, 2)
    for wanted, ranks, gpus, expected in (
        ("auto", one, 0, "cpu"), ("auto", one, 1, "cuda:0"), ("cpu", one, 1, "cpu"),
        ("auto", second_of_two, 2, "cuda:1"), ("auto", second_of_two, 1, "cpu"),
        ("auto", Launch("srun", 1, 2, 1, 2), 1, "cuda:0"), ("auto", Launch("environment", 3, 4, 3), 2, "cpu"),
    ):  # fmt: skip
        assert str(choose_device(wanted, ranks, gpus)) == expected
    with pytest.raises(InputError, match="set device=cpu"):
        choose_device("cuda", one, gpus=0)
    with pytest.raises(InputError, match="1 GPUs for 2 ranks"):
        choose_device("cuda", second_of_two, gpus=1)


def test_a_node_says_whom_it_waits_for(monkeypatch, caplog):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    monkeypatch.setattr(os, "environ", os.environ | env | address)
    monkeypatch.setattr(launch, "PATIENCE", 0.1)
    caplog.set_level(logging.WARNING, "dist_obdsd")
    with pytest.raises(RunError, match="did not meet the others"), launch.start("cpu", timeout_seconds=2):
        raise AssertionError("nobody came")
    assert f"waits at 127.0.0.1:{address['MASTER_PORT']} for the others" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_a_sentence(host, monkeypatch):
    with socket.socket() as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        monkeypatch.setattr(os, "environ", os.environ | env)
        with pytest.raises(RunError, match=f"listens at {host}:{port}; set another MASTER_PORT"), launch.start("cpu"):
            raise AssertionError("the port was taken")
