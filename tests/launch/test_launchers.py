"""Real runs through launch/*.sh: several nodes, a killed rank, signals; and doctor on several ranks."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dist_obdsd import checkpoint
from tests import chaos, runs
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


def test_two_hosts_train_with_a_torchrun_rendezvous(folder, untouched):
    with two_hosts() as hosts:
        master = f"{hosts[0].address}:{runs.free_port()}"
        processes = [
            start(
                "torchrun.sh", *SHORT, "name=hosts", cwd=folder,
                env={"NNODES": "2", "MASTER": master, "NPROC": "1", "GLOO_SOCKET_IFNAME": host.card},
                inside=host.inside,
            )
            for host in hosts
        ]  # fmt: skip
        outputs = [finished(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu (torchrun)" in "".join(outputs)
    assert rankings(folder / "runs" / "hosts") == pytest.approx(rankings(untouched(*SHORT)), rel=1e-5)


def rankings(run: Path) -> list[float]:
    return [row["ranking"] for row in runs.metrics(run, "step")]


def ranks_below(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # one that ends just now
            found[child.environ().get("RANK", "")] = child
    found.pop("", None)
    return found


def stopped(process: subprocess.Popen[str], number: int, run: Path) -> str:
    """Send a launcher a signal, and check that the run is saved and no process left; return the output."""
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    output = finished(process)
    assert runs.status(run)["state"] == "preempted", output
    assert "the same command goes on from there" in output
    _, alive = psutil.wait_procs(members, timeout=runs.SECONDS)
    assert not alive
    return output


def test_torchrun_restarts_a_killed_rank_and_saves_on_a_signal(folder, untouched):
    settings, run = ("epochs=400", "data.workers=0", "checkpoint.every_steps=2"), folder / "runs" / "tiny"
    process = start("torchrun.sh", *settings, cwd=folder, env={"RESTARTS": "1"})
    wait_for(process, lambda: chaos.steps_on_record(run) >= 5)
    first = ranks_below(process)
    first["1"].kill()
    psutil.wait_procs(list(first.values()), timeout=runs.SECONDS)
    done = chaos.steps_on_record(run)
    wait_for(process, lambda: len(ranks_below(process)) == 2)
    # In a store that outlived them, the new ranks could find the addresses of the old ones, and wait for ghosts.
    stores = {rank.environ()["TORCHELASTIC_USE_AGENT_STORE"] for rank in ranks_below(process).values()}
    assert stores == {"False"}
    wait_for(process, lambda: chaos.steps_on_record(run) > done)
    output = stopped(process, signal.SIGUSR1, run)
    assert process.returncode == 1, output
    assert "resuming runs/tiny from " in output
    settings = (*settings, f"max_steps={checkpoint.load(run)['position']['global_step'] + 2}")
    runs.train(folder, *settings, ranks=2)
    assert chaos.difference(chaos.result(untouched(*settings, ranks=2)), chaos.result(run)) is None


def test_deepspeed_s_launcher_trains_with_zero_and_saves_on_a_signal(folder, untouched):
    settings, run = ("precision=float32", "epochs=400"), folder / "runs" / "tiny"
    process = start("deepspeed.sh", *settings, cwd=folder, env={"MASTER": f"127.0.0.1:{runs.free_port()}"})
    wait_for(process, lambda: chaos.steps_on_record(run) >= 5)
    output = stopped(process, signal.SIGTERM, run)
    assert process.returncode == 75, output
    assert "2 x cpu (deepspeed)" in output
    assert rankings(run)[:5] == pytest.approx(rankings(untouched(*settings, "max_steps=5")), rel=1e-5)


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
    done = runs.program("doctor", "tiny.yaml", ranks=2, cwd=folder)
    rows = {line[:14].strip(): line[15:] for line in done.stdout.splitlines()}
    assert rows["launcher"] == "environment, rank 0 of 2"
    assert "ranks 0, 1" in rows["hosts"]
    assert rows["versions"] == "alike"
    assert rows["all-reduce"].endswith("GiB/s")
    assert rows["gather"].startswith("embeddings of 8 x 2 images, 16 dimensions")
    assert rows["clocks"].startswith("apart by ")
    assert "run folder runs/tiny: new" in done.stdout
    assert "memory of each of 2 ranks, strategy=ddp: " in done.stdout
    assert "1, 2, 4" in runs.program("doctor", "tiny.yaml", ranks=3, cwd=folder, exits=2).stderr
