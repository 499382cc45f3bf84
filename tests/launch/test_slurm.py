"""launch/slurm.sbatch on a real SLURM of two nodes: what becomes of a job that is stopped in every way there is.

``make test-slurm`` installs Debian's SLURM and runs this as root, in about 15 minutes. It prints a row a case.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import chaos, runs
from tests.launch.hosts import Host, two_hosts
from tests.runs import ROOT

pytestmark = pytest.mark.skipif(os.environ.get("TEST_SLURM") != "1", reason="make test-slurm runs it")
SECONDS = 600.0

CONFIG = """
ClusterName=tiny
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=@/munge.socket,cred_expire=15
StateSaveLocation=@/state
SlurmdSpoolDir=@/spool-%n
SlurmctldPidFile=@/slurmctld.pid
SlurmdPidFile=@/slurmd-%n.pid
SlurmctldLogFile=@/slurmctld.log
SlurmdLogFile=@/slurmd-%n.log
ProctrackType=proctrack/linuxproc
ReturnToService=2
SchedulerParameters=sched_interval=3,bf_interval=3
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=3600
SlurmdTimeout=20
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr=10.77.0.1 Port=17001 CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=node2 NodeAddr=10.77.0.2 Port=17002 CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=off
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=off
"""


class Cluster:
    """Two nodes, of which the first is the controller, too."""

    def __init__(self, folder: Path, hosts: list[Host]) -> None:
        self.hosts, self.processes = hosts, list[subprocess.Popen[bytes]]()
        for name in ("state", "spool-node1", "spool-node2"):
            (folder / name).mkdir()
        for name in ("gpu0", "gpu1"):  # any file will do for a GPU
            (folder / name).touch()
        (folder / "slurm.conf").write_text(CONFIG.replace("@", str(folder)))
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        own = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file",
               "log-file", "seed-file")]  # fmt: skip
        self._start(hosts[0], "munged", "--foreground", "--force", *own)
        self._start(hosts[0], "slurmctld", "-D")
        for host in hosts:
            self._start(host, "slurmd", "-D", "-N", host.name)

    def _start(self, host: Host, *command: str) -> None:
        nothing = subprocess.DEVNULL
        self.processes.append(subprocess.Popen([*host.inside, *command], env=self.env, stdout=nothing, stderr=nothing))

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [*self.hosts[0].inside, *command], env=self.env, cwd=cwd, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or done.stderr.strip()

    def wait(self, event: Callable[[], object], what: str = "") -> None:
        deadline = time.monotonic() + SECONDS
        while not event():
            assert time.monotonic() < deadline, f"{what}: {self.ask('squeue')} {self.ask('sinfo')}"
            time.sleep(0.5)

    def close(self) -> None:
        self.ask("scancel", "--user=root", "--signal=KILL", "--full")
        for process in reversed(self.processes):
            process.terminate()
            process.wait()


class Job:
    """A job of slurm.sbatch on the tiny config, one rank a node."""

    def __init__(self, cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "runs" / "tiny"
        if not (folder / ".venv").exists():
            (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
            (folder / "launch").symlink_to(ROOT / "launch")
        common = ("--parsable", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=100", "--time=10")
        script = "launch/slurm.sbatch"
        self.id = cluster.ask("sbatch", *common, *options, script, "tiny.yaml", *overrides, cwd=folder)
        assert self.id.isdigit(), self.id

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.cluster.ask("scontrol", "show", "job", self.id))
        return found[1] if found else ""

    @property
    def output(self) -> str:
        path = self.folder / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait_for_steps(self, n: int) -> None:
        self.cluster.wait(lambda: chaos.steps_on_record(self.run) >= n, self.output)

    def wait_for(self, *states: str, restarts: int = 0) -> None:
        """Wait for a state after so many returns to the queue."""
        self.cluster.wait(
            lambda: self.field("JobState") in states and int(self.field("Restarts")) >= restarts, self.output
        )

    def row(self, case: str) -> tuple[str, int, str]:
        """Print and return (job state, restarts, status of the run)."""
        status = runs.status(self.run)["state"] if (self.run / "status.json").exists() else "none"
        found = self.field("JobState"), int(self.field("Restarts")), status
        resumed = ", ".join(re.findall(r"(\d+) steps are done", self.output)) or "-"
        print(f"\n{case:30} job {found[0]:10} restarts {found[1]}  run {status:10} resumed at {resumed}", flush=True)
        return found

    def saved_and_goes_on(self, case: str, *, restarts: int = 1) -> None:
        """The job came back by itself, went on from where it was saved, and ends when it is cancelled."""
        self.wait_for("RUNNING", restarts=restarts)
        self.cluster.wait(lambda: "steps are done" in self.output, self.output)
        self.cluster.ask("scancel", self.id)
        self.wait_for("CANCELLED")
        assert self.row(case)[:2] == ("CANCELLED", restarts), self.output


LONG = "epochs=100000"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip") if shutil.which(name) is None]
    assert os.geteuid() == 0, "needs root"
    assert not missing, f"make test-slurm installs {missing}"
    with two_hosts() as hosts:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"), hosts)
        try:
            cluster.wait(lambda: cluster.ask("sinfo", "-hNp", "main", "-o", "%T").split() == ["idle", "idle"])
            yield cluster
        finally:
            cluster.close()


@pytest.mark.parametrize(
    ("case", "overrides", "options", "end", "said"),
    [
        ("finish", ["epochs=2"], (), ("COMPLETED", 0, "finished"), "2 x cpu (torchrun)"),
        ("no GPU", ["max_steps=3"], ("--gpus-per-node=0", "--nodes=1"), ("COMPLETED", 0, "finished"), "cpu (torchrun)"),
        ("bad config", ["batch.global_size=15"], (), ("FAILED", 0, "none"), "batch.global_size=15"),
    ],
)
def test_a_job_that_nobody_stops_ends(cluster, folder, case, overrides, options, end, said):
    job = Job(cluster, folder, *overrides, options=options)
    job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert job.row(case) == end, job.output
    assert said in job.output


HIGH = ("sbatch", "--partition=high", "--nodes=2", "--gpus-per-node=2", "--mem=100", "--output=/dev/null",
        "--wrap=sleep 1")  # fmt: skip


@pytest.mark.parametrize(
    ("case", "options", "stop"),
    [
        ("USR1 to the script", (), ("scancel", "--batch", "--signal=USR1", "ID")),  # as --signal=B:USR1@120 sends it
        ("preemption, with grace", ("--partition=grace",), HIGH),
        ("preemption, no grace", ("--partition=low",), HIGH),
        ("time limit", ("--time=4", "--signal=B:USR1@120"), ("true",)),
        ("scontrol requeue", (), ("scontrol", "requeue", "ID")),
    ],
)
def test_a_job_that_is_stopped_comes_back_and_goes_on(cluster, folder, case, options, stop):
    job = Job(cluster, folder, LONG, options=options)
    job.wait_for_steps(5)
    cluster.ask(*(job.id if word == "ID" else word for word in stop), cwd=folder)
    job.saved_and_goes_on(case)
    assert ("stopped by SIGUSR1" in job.output) >= (case == "USR1 to the script")


def test_scancel(cluster, folder):
    job = Job(cluster, folder, LONG)
    job.wait_for_steps(5)
    cluster.ask("scancel", job.id)
    job.wait_for("CANCELLED", "PENDING")
    cluster.wait(lambda: runs.status(job.run)["state"] != "running")
    assert job.row("scancel") == ("CANCELLED", 0, "preempted"), job.output


def test_node_down(cluster, folder):
    """The second node's link is cut; SLURM queues the job again, and the run goes on when the node is back."""
    job = Job(cluster, folder, LONG, "checkpoint.every_steps=5", "timeout_seconds=20")
    job.wait_for_steps(12)
    cluster.hosts[1].link("down")
    try:
        job.wait_for("PENDING", "REQUEUED", "COMPLETING", "NODE_FAIL", "FAILED", restarts=1)
    finally:
        cluster.hosts[1].link("up")
    job.saved_and_goes_on("node down")


def test_a_stop_file(cluster, folder):
    job = Job(cluster, folder, LONG)
    job.wait_for_steps(5)
    runs.program("stop", "tiny.yaml", LONG, cwd=folder)
    job.wait_for("FAILED", "COMPLETED", "PENDING")
    assert job.row("dist-obdsd stop") == ("FAILED", 0, "preempted"), job.output
    assert job.field("ExitCode") == "75:0"


def test_a_job_that_gets_nowhere_is_queued_three_times(cluster, folder):
    """Each time a signal comes while doctor looks, before any step."""
    job = Job(cluster, folder, LONG)
    for restarts in range(4):
        job.wait_for("RUNNING", restarts=restarts)
        cluster.wait(lambda: f"{job.id}.0" in cluster.ask("squeue", "--steps", "-h", "-o", "%i"), job.output)
        cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("FAILED", "COMPLETED")
    assert job.row("USR1 while doctor looks, x 4") == ("FAILED", 3, "none"), job.output
    assert "queued 3 times, and no step" in job.output


def test_an_array_of_a_comparison(cluster, folder):
    words = ("compare", "tiny.yaml", "max_steps=3", "--variants", "none,obdsd", "--seeds", "1")
    jobs = runs.program(*words, "--jobs", "slurm", cwd=folder)
    (folder / "jobs.txt").write_text(jobs.stdout)
    line = 'eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" jobs.txt)"'
    array = cluster.ask("sbatch", "--parsable", "--array=1-2", "--mem=100", f"--wrap={line}", cwd=folder)
    cluster.wait(lambda: array not in cluster.ask("squeue", "-h", "-o", "%F"))
    report = runs.program(*words, "--report-only", cwd=folder)
    print(f"\narray of compare: {report.stdout.splitlines()[-3:]}")
