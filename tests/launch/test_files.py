"""The launch files: shell without known traps, YAML that Kubernetes takes, settings that DeepSpeed and we take."""

import json
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dist_obdsd.cli.parser import parse
from dist_obdsd.errors import InputError
from dist_obdsd.training.deepspeed import engine_options
from tests.runs import ROOT

LAUNCH = ROOT / "launch"
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


def test_the_kubernetes_job_is_what_the_operator_takes():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"].keys() == {"nprocPerNode", "elasticPolicy", "pytorchReplicaSpecs"}
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": worker["template"]["spec"]}
    kubernetes_validate.validate(pod, "1.29", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "volume": []}}, "1.29", strict=True)

    (container,) = pod["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    command = container["command"]
    grace = next(int(part.partition("=")[2]) for part in command if part.startswith("--shutdown-timeout"))
    assert 30 <= grace < pod["spec"]["terminationGracePeriodSeconds"]
    assert any("SIGUSR1" in part and "SIGTERM" in part for part in command)
    options = parse(command[command.index("dist_obdsd") + 1 :])
    assert options.command == "train"
    assert (ROOT / options.config).is_file()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_deepspeed_files_are_taken(stage):
    options = engine_options(str(LAUNCH / f"zero{stage}.json"), None)
    assert options["zero_optimization"]["stage"] == stage
    with pytest.raises(InputError, match=f"deepspeed.stage is {3 - stage} but .* has stage {stage}"):
        engine_options(str(LAUNCH / f"zero{stage}.json"), 3 - stage)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train_batch_size": 8}, "sets train_batch_size, which batch.global_size decides"),
        ({"bf16": {"enabled": True}}, "sets bf16, which precision decides"),
        ({"zero_optimization": {"stage": 3}}, "progressive teacher is a copy"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "is not supported; take it out"),
        ([], "is not a DeepSpeed configuration"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_refused(tmp_path, content, sentence):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=sentence):
        engine_options(str(path), None)


@pytest.mark.parametrize(("name", "words"), [("half.json", "valid JSON"), ("none.json", "No such file")])
def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path, name, words):
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(InputError, match=f"{name}.*{words}"):
        engine_options(str(tmp_path / name), None)
