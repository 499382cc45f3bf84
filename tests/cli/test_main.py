"""Help, exit codes, how the program ends; ``doctor`` on weights, and the template for one's own photos."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_obdsd.cli.main import COMMANDS
from dist_obdsd.cli.parser import parse
from dist_obdsd.config import load_config, registry
from dist_obdsd.models.backbones import library_weights
from tests import runs

PARTS = [registry.LOSSES, registry.TARGETS, registry.BACKBONES, registry.STRATEGIES]
SETTINGS = [text for part in PARTS for text in (part.setting, *part.paths)]


def python(*arguments, stdout=subprocess.PIPE, cwd=None):
    """Run Python in a process that has imported nothing yet."""
    line, env = [sys.executable, *arguments], runs.environment()
    return subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env, check=False)


@pytest.mark.parametrize(
    ("command", "names", "imports"), [([], list(COMMANDS), set()), (["train"], SETTINGS, {"pydantic"})]
)
def test_help_names_what_there_is_and_imports_little(command, names, imports):
    done = python("-X", "importtime", "-m", "dist_obdsd", *command, "--help")
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dist_obdsd.cli.main" in modules
    assert modules & {"torch", "pydantic", "numpy"} == imports
    assert all(f" {name}" in done.stdout for name in names)
    assert "reader" not in done.stdout  # a recipe's


def test_a_tilde_in_an_option_is_the_home_folder():
    options = parse(["pack", "glyphs", "--out=~/x", "--source=a~"])
    assert (options.out, options.source) == (Path.home() / "x", Path("a~"))


ENDING = """
import atexit, threading, time
from dist_obdsd.cli import main as cli
def main(arguments):
    threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()
    atexit.register(print, 'at exit')
    print('main')
    return CODE
cli.main = main
cli.program()
"""


def test_a_program_ends_after_its_threads_and_exit_handlers():
    done = python("-c", ENDING.replace("CODE", "3"))
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split("\n") == ["main", "thread", "at exit", ""]
    with open("/dev/full", "w") as full:
        assert python("-c", ENDING.replace("CODE", "0"), stdout=full).returncode == 1  # output that cannot be written


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG)
    reads, writes = os.pipe()
    os.close(reads)  # as head does
    done = python("-m", "dist_obdsd", "status", "tiny.yaml", stdout=writes, cwd=tmp_path)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ("trian", "invalid choice: 'trian'"),
        ("train", "required: config\n"),  # overrides are not
        ("pack glyphs", "required: --out"),
        ("train a.yaml --nonsense", "--nonsense"),
        ("doctor tiny.yaml data.x=1", "unknown setting data.x"),
        ("train tiny.yaml threads=99999", "threads is 99999"),  # it would crash torch
        ("train tiny.yaml timeout_seconds=1e99", "timeout_seconds is 1e+99"),  # so would this
        ("train empty.yaml", "empty.yaml holds nothing"),
    ],
)
def test_bad_usage_exits_with_2(arguments, fact, folder):
    (folder / "empty.yaml").touch()
    assert fact in runs.program(*arguments.split(), cwd=folder, exits=2).stderr


def test_a_sentence_is_what_torchrun_ends_with(folder):
    done = python(*runs.command("train", "tiny.yaml", "data.shards=nowhere", ranks=2)[1:], cwd=folder)
    lines = [line for line in done.stderr.splitlines() if line.strip(" =")]
    assert "there is no shard folder nowhere" in lines[0]
    assert lines[-1].endswith(lines[0].removeprefix("dist-obdsd: "))
    assert "dist_obdsd/data" not in done.stderr  # no traceback of ours


def test_doctor_says_whether_weights_are_there(cli, folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    grey = ["doctor", "tiny.yaml", "data.mean=null", "data.std=null", "data.channels=3", "model.backbone=resnet18"]
    # The first option is that of DeepSpeed's launcher.
    said = cli("--local_rank=0", *grey, "model.pretrained=none", cwd=folder).stdout
    assert "network: resnet18 with 11.2 million weights, from none" in said
    assert torch.__version__.split("+")[0] in said
    assert "1, 2, 4 ranks" in said
    assert "all-reduce" not in said  # one rank
    said = cli(*grey, "model.pretrained=torchvision", cwd=folder).stdout
    assert f"is not in {folder}/hub/hub/checkpoints; --download fetches it" in said
    failed = cli(*grey, "model.pretrained=torchvision", "--download", cwd=folder, exits=2)
    assert "cannot be downloaded" in failed.stderr
    assert "memory of each" in failed.stdout
    assert "strategy=fsdp" not in failed.stdout  # another strategy's, where the config's own fits


def test_the_template_serves_twelve_classes_of_eight_photos(tmp_path):
    """Without a network, with nothing edited; only smaller images, fewer epochs and workers."""
    runs.make_images(tmp_path / "photos", classes=12)
    runs.program("pack", "folder", "--source", "photos", "--out", "data/folder", "--workers", "1", cwd=tmp_path)
    shutil.copy(runs.ROOT / "configs" / "folder.yaml", tmp_path)
    alone = {"HF_HOME": f"{tmp_path}/hub", "https_proxy": "http://127.0.0.1:9"}  # where nobody answers
    short = ("name=run", "epochs=2", "data.image_size=64", "data.workers=0")
    quiet = ("tracking.kind=none", "tracking.figures=false")
    done = runs.program("train", "folder.yaml", *short, *quiet, cwd=tmp_path, env=alone)
    assert "until then small_cnn is trained from random weights" in done.stdout
    assert "optim.lr=0.0009" in done.stdout
    rows = runs.summary(tmp_path / "runs" / "run")["rows"]
    assert {row["protocol"] for row in rows} == {"untrained", "last", "best_validation"}
    found = library_weights(load_config(tmp_path / "folder.yaml").model.backbone, "timm")
    cached = tmp_path / "hub" / "hub" / f"models--{found.file.rpartition('/')[0].replace('/', '--')}"
    for file, text in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "")):
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    again = runs.program("train", "folder.yaml", *short, *quiet, cwd=tmp_path, env=alone)
    assert "begun without the weights" in again.stdout  # now that they are there
    assert "finished already" in again.stdout
