"""A machine without the optional packages: runs do without them, and other commands name what they lack."""

import subprocess
import sys

from dist_obdsd.cli import main as cli
from dist_obdsd.tracking.system_metrics import SystemMetrics
from tests import runs

HIDDEN = (
    "deepspeed", "faiss", "matplotlib", "mlflow", "onnx", "onnxruntime", "onnxscript", "pandas", "psutil", "pyarrow",
    "pynvml", "pytest", "pytorch_metric_learning", "rich", "scipy", "sklearn", "timm", "tqdm",
)  # fmt: skip
BARE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare

import benchmarks.step
from dist_obdsd.cli.main import main

sys.exit(main(["pack", "folder", "--source", sys.argv[1], "--out", "packed"])
         or main(["train", "tiny.yaml", "data.shards=packed"]))
"""


def test_packing_and_training_need_no_optional_package(folder, shards):
    done = subprocess.run(
        [sys.executable, "-c", BARE, shards.parent / "images"], cwd=folder, env=runs.environment(),
        capture_output=True, text=True, timeout=runs.SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.status(folder / "runs" / "tiny")["state"] == "finished"


def test_a_command_says_which_package_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["pack", "glyphs", "--out", "glyphs"]) == 2
    error = capsys.readouterr().err
    assert "pack needs matplotlib" in error
    assert "Traceback" not in error


def test_another_module_that_is_missing_is_a_defect(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "doctor", "lost")
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_node_is_watched_as_far_as_the_packages_go(monkeypatch):
    assert "system_memory_usage_megabytes" in SystemMetrics().read()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert not any(name.startswith(("cpu", "system")) for name in SystemMetrics().read())
