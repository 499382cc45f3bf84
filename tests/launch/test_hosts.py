"""Two hosts that lose each other, or are reached over ssh: what each side does, and that the run goes on.

Part of ``make test-slurm``: it needs root, namespaces, sshd and pdsh. It prints a row a case.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import chaos, runs
from tests.launch.hosts import Host, two_hosts
from tests.launch.test_launchers import finished, start, wait_for

pytestmark = pytest.mark.skipif(os.environ.get("TEST_SLURM") != "1", reason="make test-slurm runs it")
SETTINGS = ("epochs=30", "data.workers=0", "timeout_seconds=20", "checkpoint.every_steps=3")
LONG = "epochs=100000"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with two_hosts() as found:
        assert found[0].namespace, "needs root and network namespaces"
        yield found


def start_agents(hosts: list[Host], folder: Path, local: int) -> list[subprocess.Popen[str]]:
    env = {"NNODES": "2", "NPROC": str(local), "MASTER": f"{hosts[0].address}:29500", "GLOO_SOCKET_IFNAME": "eth0"}
    return [start("torchrun.sh", *SETTINGS, cwd=folder, env=env, inside=host.inside) for host in hosts]


def processes_on(host: Host, word: bytes) -> list[int]:
    """The processes on a host whose program, script or module has the word in its name."""
    found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    pids = []
    for pid in map(int, found.stdout.split()):
        with suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]
            if word in b" ".join(arguments):
                pids.append(pid)
    return pids


@pytest.mark.parametrize("case", ["TERM", "KILL", "link down"])
@pytest.mark.parametrize("local", [1, 2])
def test_a_host_is_lost_and_the_run_goes_on_with_the_same_bits(folder, hosts, case, local):
    runs.train(folder, "name=whole", *SETTINGS, ranks=2 * local)
    run = folder / "runs" / "tiny"
    agents = start_agents(hosts, folder, local)
    wait_for(agents[0], lambda: chaos.steps_on_record(run) >= 6)
    since, seconds = time.monotonic(), {}
    if case == "TERM":
        (agent,) = processes_on(hosts[1], b"torchrun")
        os.kill(agent, signal.SIGTERM)
    elif case == "KILL":
        for pid in processes_on(hosts[1], b""):
            os.kill(pid, signal.SIGKILL)
    else:
        # Else its torchrun would wait for a quarter of an hour for an answer of its store.
        subprocess.run([*hosts[1].inside, "sysctl", "-qw", "net.ipv4.tcp_retries2=6"], check=True)
        hosts[1].link("down")
    while len(seconds) < 2:  # until no rank is left on either host
        assert time.monotonic() < since + runs.SECONDS, f"{case}: ranks are left"
        time.sleep(0.2)
        ended = [host.name for host in hosts if host.name not in seconds and not processes_on(host, b"dist_obdsd")]
        seconds |= dict.fromkeys(ended, time.monotonic() - since)
    outputs = [finished(agent) for agent in agents]
    hosts[1].link("up")
    status = runs.status(run)
    print(f"\n{case}, 2 x {local}: run {status['state']}: {status['message']}")
    for host, agent in zip(hosts, agents, strict=True):
        print(f"  {host.name}: ranks ended after {seconds[host.name]:.0f} s, torchrun's exit code {agent.returncode}")
    assert status["state"] == ("preempted" if case == "TERM" else "failed")
    if case == "link down":
        for host, output in zip(hosts, outputs, strict=True):
            assert re.search(rf"rank \d on {host.name} at step \d+: ", output), output
    assert all(agent.returncode for agent in agents)
    agents = start_agents(hosts, folder, local)
    outputs = [finished(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "resuming runs/tiny" in "".join(outputs)
    assert chaos.difference(chaos.result(folder / "runs" / "whole"), chaos.result(run)) is None


@contextmanager
def ssh_to(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """sshd on both hosts, and the environment in which `ssh` gets there without a password."""
    keys = folder / "ssh"
    (keys / "bin").mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    (keys / "sshd").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin yes\n"
    )
    (keys / "config").write_text(
        f"Host *\n IdentityFile {keys}/user\n StrictHostKeyChecking no\n"
        " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    (keys / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {keys}/config "$@"\n')
    (keys / "bin" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = [subprocess.Popen([*host.inside, "/usr/sbin/sshd", "-D", "-f", str(keys / "sshd")]) for host in hosts]
    try:
        yield {"PATH": f"{keys}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    finally:
        for server in servers:
            server.terminate()
            server.wait()


@pytest.mark.parametrize("local", [1, 2])
def test_deepspeed_over_ssh_saves_on_a_signal_and_goes_on(folder, hosts, local):
    (folder / "hosts").write_text(f"node1 slots={local}\nnode2 slots={local}\n")
    settings = ("precision=float32", "data.workers=0")
    with ssh_to(hosts, folder) as env:
        env |= {"HOSTFILE": "hosts", "GLOO_SOCKET_IFNAME": "eth0"}
        process = start("deepspeed.sh", *settings, LONG, cwd=folder, env=env, inside=hosts[0].inside)
        run = folder / "runs" / "tiny"
        wait_for(process, lambda: chaos.steps_on_record(run) >= 5)
        since = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = finished(process)
        status = runs.status(run)
        print(f"\nSIGTERM to deepspeed.sh, 2 x {local} over ssh: exit {process.returncode} after "
              f"{time.monotonic() - since:.0f} s, run {status['state']}: {status['message']}", flush=True)  # fmt: skip
        assert (process.returncode, status["state"]) == (75, "preempted"), output
        assert f"{2 * local} x cpu (deepspeed)" in output
        assert not [pid for host in hosts for pid in processes_on(host, b"dist_obdsd")]
        steps = f"max_steps={chaos.steps_on_record(run) + 2}"
        process = start("deepspeed.sh", *settings, LONG, steps, cwd=folder, env=env, inside=hosts[0].inside)
        output = finished(process)
        assert (process.returncode, runs.status(run)["state"]) == (0, "finished"), output
        assert "resuming runs/tiny" in output
        process = start("deepspeed.sh", "batch.global_size=15", cwd=folder, env=env, inside=hosts[0].inside)
        assert "batch.global_size=15" in finished(process)
        assert process.returncode in (1, 2)
