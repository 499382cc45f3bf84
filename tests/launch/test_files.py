"""The launch files: shell without known traps, YAML that Kubernetes takes, settings that DeepSpeed and we take."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dist_obdsd.cli.parser import parse
from dist_obdsd.config import load_config
from dist_obdsd.data.from_config import check_world_size
from dist_obdsd.errors import InputError
from dist_obdsd.training.deepspeed import engine_options
from tests.runs import ROOT, environment

LAUNCH = ROOT / "launch"
CRDS = Path(os.environ.get("DIST_OBDSD_DATA", ROOT.parent / "shared" / "data")).parent / "cluster" / "crds"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_shell_scripts_pass_shellcheck():
    assert {script.name for script in SCRIPTS} == {"torchrun.sh", "deepspeed.sh", "slurm.sbatch"}
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the dev packages
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    control = subprocess.run([shellcheck, "-"], input=b"#!/bin/sh\nrm -rf $1/\n", capture_output=True, check=False)
    assert control.returncode == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_say_how_they_are_used(script):
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: " in done.stderr
    assert script.name in done.stderr


@pytest.mark.parametrize(
    ("python", "is_asked", "facts"),
    [
        (sys.executable, True, ["another program listens at MASTER="]),
        (f"{sys.executable} -S", False, ["is taken", "No module named 'torch'"]),  # -S: without packages
    ],
)
def test_a_taken_port_is_a_sentence(tmp_path, python, is_asked, facts):
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.settimeout(180)  # torch may be slow to import
        master = f"MASTER=127.0.0.1:{taken.getsockname()[1]}"
        env = environment({"NNODES": "2", "MASTER": master.partition("=")[2]})
        env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
        command = ["bash", LAUNCH / "torchrun.sh", "x.yaml"]
        script = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        if is_asked:  # whether it is another agent
            taken.accept()[0].close()
        _, said = script.communicate()
    assert script.returncode == 1
    assert len(said.splitlines()) == 1
    assert all(fact in said for fact in (master, *facts)), said


def load_kind(file: str, kind: str) -> dict[str, Any]:
    (found,) = [part for part in yaml.safe_load_all((LAUNCH / file).read_text()) if part["kind"] == kind]
    return found


def closed(schema: Any) -> Any:
    """A custom resource's schema that refuses unknown fields, as the API server does with strict validation."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("kind", ["Job", "Service"])
def test_kubernetes_takes_the_job_without_an_operator(kind):
    found = load_kind("kubernetes.yaml", kind)
    kubernetes_validate.validate(found, "1.29", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found | {"spec": found["spec"] | {"volume": []}}, "1.29", strict=True)


@pytest.mark.parametrize(
    ("file", "kind", "crd"), [("pytorchjob", "PyTorchJob", "pytorchjob-1.9"), ("trainjob", "TrainJob", "trainjob-2.3")]
)
def test_the_operators_take_their_jobs(file, kind, crd):
    path = CRDS / f"{crd}.yaml"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    job = load_kind(f"{file}.yaml", kind)
    (version,) = yaml.safe_load(path.read_text())["spec"]["versions"]
    assert job["apiVersion"].endswith(version["name"])
    schema = version["schema"]["openAPIV3Schema"]
    check = jsonschema.Draft7Validator(schema | {"properties": closed(schema["properties"])})
    assert list(check.iter_errors(job)) == []
    assert list(check.iter_errors(job | {"spec": job["spec"] | {"volume": []}}))  # the control


def pods_and_ranks(file: str) -> tuple[dict[str, Any] | None, int, int, list[str]]:
    """A job's pod, its pods, the ranks of each, and what follows ``train``."""
    if file == "kubernetes.yaml":
        spec = load_kind(file, "Job")["spec"]
        assert spec["completions"] == spec["parallelism"]
        (container,) = spec["template"]["spec"]["containers"]
        env = {one["name"]: one["value"] for one in container["env"]}
        assert env["MASTER"] == f"dist-obdsd-0.{load_kind(file, 'Service')['metadata']['name']}:29500"
        assert int(env["NNODES"]) == spec["completions"]
        assert int(env["GRACE"]) < spec["template"]["spec"]["terminationGracePeriodSeconds"]
        return spec["template"]["spec"], spec["completions"], int(env["NPROC"]), container["args"]
    if file == "trainjob.yaml":
        trainer = load_kind(file, "TrainJob")["spec"]["trainer"]
        return None, trainer["numNodes"], trainer["numProcPerNode"], trainer["args"]
    spec = load_kind(file, "PyTorchJob")["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert spec["elasticPolicy"]["minReplicas"] <= worker["replicas"] <= spec["elasticPolicy"]["maxReplicas"]
    pod = worker["template"]["spec"]
    command = pod["containers"][0]["command"]
    return pod, worker["replicas"], int(spec["nprocPerNode"]), command[command.index("train") + 1 :]


@pytest.mark.parametrize("file", ["kubernetes.yaml", "trainjob.yaml", "pytorchjob.yaml"])
def test_a_kubernetes_job_fits_the_config_that_it_names(file):
    pod, pods, ranks, arguments = pods_and_ranks(file)
    fits(pods * ranks, arguments)
    if pod is not None:
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def fits(ranks: int, arguments: list[str]) -> None:
    """Check that a config, as given to ``train``, can run on so many ranks."""
    options = parse(["train", *arguments])
    check_world_size(load_config(ROOT / options.config, options.overrides), ranks)


def test_the_other_launch_files_fit_the_configs_that_they_name():
    sbatch = (LAUNCH / "slurm.sbatch").read_text()
    nodes, gpus = (int(re.findall(rf"#SBATCH --{name}=(\d+)", sbatch)[0]) for name in ("nodes", "gpus-per-node"))
    fits(nodes * gpus, re.findall(r"sbatch launch/slurm.sbatch (\S+)", sbatch)[:1])
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    each = int(task["resources"]["accelerators"].partition(":")[2])
    fits(task["num_nodes"] * each, re.findall(r"torchrun.sh (.*)", task["run"])[0].split())
    slots = sum(map(int, re.findall(r"slots=(\d+)", (LAUNCH / "hostfile.example").read_text())))
    named = re.findall(r"HOSTFILE=launch/hostfile launch/deepspeed.sh (\S+)", (LAUNCH / "deepspeed.sh").read_text())
    fits(slots, named[:1])
    with pytest.raises(InputError):  # the control
        fits(nodes * gpus, ["configs/cub200.yaml"])


def test_the_image_runs_what_the_jobs_run_and_not_as_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines]
    copied = {path for line in words if line[:1] == ["COPY"] for path in line[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)
    assert {"configs", "launch"} <= copied
    (user,) = [line[1] for line in words if line[:1] == ["USER"]]
    assert ["useradd", "--uid", user] in [line[1:4] for line in words]
    for file, kind in (("kubernetes.yaml", "Job"), ("pytorchjob.yaml", "PyTorchJob"), ("trainjob.yaml", "TrainJob")):
        assert f"'runAsUser': {user}," in str(load_kind(file, kind))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_deepspeed_files_are_taken(stage):
    assert engine_options(str(LAUNCH / f"zero{stage}.json"), None)["zero_optimization"]["stage"] == stage
    with pytest.raises(InputError, match=f"deepspeed.stage is {3 - stage} but .* has stage {stage}"):
        engine_options(str(LAUNCH / f"zero{stage}.json"), 3 - stage)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"train_batch_size": 8}', "sets train_batch_size, which batch.global_size decides"),
        ('{"bf16": {"enabled": true}}', "sets bf16, which precision decides"),
        ('{"zero_optimization": {"stage": 3}}', "progressive teacher is a copy"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', "not supported; take it out"),
        ("[]", "is not a DeepSpeed configuration"),
        ("{", "ds.json.*valid JSON"),
        (None, "ds.json.*No such file"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        engine_options(str(tmp_path / "ds.json"), None)
