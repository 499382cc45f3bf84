"""Real runs through launch/*.sh: several nodes, DeepSpeed's launcher, signals, and doctor on several ranks."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import runs
from tests.launch.hosts import two_hosts
from tests.runs import ROOT

SHORT = ("precision=float32", "max_steps=3", "epochs=2")


def start(script: str, *overrides: str, cwd: Path, env: dict[str, str] | None = None, inside: tuple[str, ...] = ()
          ) -> subprocess.Popen[str]:  # fmt: skip
    """A launch script on the tiny config, perhaps inside a network namespace."""
    return subprocess.Popen(
        [*inside, str(ROOT / "launch" / script), "tiny.yaml", *overrides], cwd=cwd, text=True,
        env=runs.environment({"NPROC": "2"} | (env or {})), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a launcher's end and return what it printed."""
    try:
        output, _ = process.communicate(timeout=runs.SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"did not end: {output[-3000:]}") from None
    return output


def wait_for(process: subprocess.Popen[str], event: Callable[[], bool]) -> None:
    """Wait until something has happened while a launcher runs."""
    deadline = time.monotonic() + runs.SECONDS
    while not event():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_hosts_train_with_a_torchrun_rendezvous(folder):
    with two_hosts() as hosts:
        master = f"{hosts[0].address}:{runs.free_port()}"
        processes = [
            start(
                "torchrun.sh", *SHORT, "name=hosts", cwd=folder,
                env={"NNODES": "2", "MASTER": master, "NPROC": "2", "GLOO_SOCKET_IFNAME": host.card},
                inside=host.inside,
            )
            for host in hosts
        ]  # fmt: skip
        outputs = [finished(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "4 x cpu (torchrun)" in "".join(outputs)
    runs.train(folder, *SHORT, "name=alone")
    found, expected = (runs.metrics(folder / "runs" / name, "step") for name in ("hosts", "alone"))
    assert [row["ranking"] for row in found] == pytest.approx([row["ranking"] for row in expected], rel=1e-5)


def test_deepspeed_s_launcher_trains_with_zero(folder):
    process = start("deepspeed.sh", *SHORT, "name=zero", cwd=folder, env={"MASTER": f"127.0.0.1:{runs.free_port()}"})
    output = finished(process)
    assert process.returncode == 0, output
    assert "2 x cpu (deepspeed)" in output
    runs.train(folder, *SHORT, "name=alone")
    found, expected = (runs.metrics(folder / "runs" / name, "step") for name in ("zero", "alone"))
    assert [row["ranking"] for row in found] == pytest.approx([row["ranking"] for row in expected], rel=1e-5)
    # Another stage and strategy go on from its checkpoint.
    runs.train(folder, "precision=float32", "epochs=2", "name=zero", ranks=0)
    assert runs.status(folder / "runs" / "zero")["state"] == "finished"


@pytest.mark.parametrize(
    ("script", "number"),
    [("torchrun.sh", signal.SIGUSR1), ("deepspeed.sh", signal.SIGTERM)],
    ids=["torchrun", "deepspeed"],
)
def test_a_signal_saves_and_leaves_no_process(folder, script, number):
    env = {"MASTER": f"127.0.0.1:{runs.free_port()}"} if script == "deepspeed.sh" else {}
    process = start(script, "precision=float32", "epochs=400", cwd=folder, env=env)
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and '"step": 5,' in metrics.read_text())
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    output = finished(process)
    assert runs.status(folder / "runs" / "tiny")["state"] == "preempted", output
    assert "the same command goes on from there" in output
    _, alive = psutil.wait_procs(members, timeout=runs.SECONDS)
    assert not alive
    assert process.returncode == (75 if script == "deepspeed.sh" else 1)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "cannot read"),
        ("a slots=1\nb\n", 'line 2 is "b"'),
        ("a slots=1\na slots=2\n", "a again"),
        ("#a\n", "no host"),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_refused(folder, content, fact):
    if content is not None:
        (folder / "hosts").write_text(content)
    process = start("deepspeed.sh", cwd=folder, env={"HOSTFILE": "hosts"})
    (line,) = finished(process).splitlines()
    assert "HOSTFILE=hosts" in line
    assert fact in line
    assert process.returncode == 2


def test_doctor_measures_what_lies_between_the_ranks(folder):
    done = runs.program("doctor", "tiny.yaml", ranks=2, cwd=folder, anew=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:14].strip(): line[15:] for line in done.stdout.splitlines()}
    assert rows["launcher"] == "torchrun, rank 0 of 2"
    assert "ranks 0, 1" in rows["hosts"]
    assert rows["versions"] == "alike"
    assert rows["all-reduce"].endswith("GiB/s")
    assert rows["gather"].startswith("embeddings of 8 x 2 images, 16 dimensions")
    assert rows["clocks"].startswith("apart by ")
    assert "run folder runs/tiny: new" in done.stdout
    assert "memory of each of 2 ranks, strategy=fsdp: " in done.stdout
    refused = runs.program("doctor", "tiny.yaml", ranks=3, cwd=folder)
    assert refused.returncode != 0
    assert "1, 2, 4" in refused.stderr
