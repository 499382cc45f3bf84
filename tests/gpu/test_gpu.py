"""The checks of a device: on a GPU where there is one, and their code on a CPU; and that each can fail."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.training import strategy
from dist_obdsd.training.checkpoint_manager import CheckpointManager
from tests import harness, runs
from tests.gpu import __main__ as program
from tests.gpu import exact, smoke
from tests.gpu import runs as whole
from tests.gpu.rig import CPU, CheckError, Skipped, within

ALL = [(part, name) for part in program.PARTS for name in program.checks(part)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize(("part", "name"), ALL)
def test_on_a_gpu(part, name):
    try:
        print(program.checks(part)[name](torch.device("cuda", 0), False))
    except Skipped as reason:
        pytest.skip(str(reason))


HIDDEN = (
    "_pytest", "deepspeed", "faiss", "hypothesis", "matplotlib", "mlflow", "onnx", "onnxruntime", "onnxscript",
    "pandas", "psutil", "pyarrow", "pynvml", "pytest", "pytorch_metric_learning", "rich", "scipy", "sklearn", "tqdm",
)  # fmt: skip
BARE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
"""A ``sitecustomize``, which every Python imports that finds one: packages look as on a machine without them."""


def test_a_bare_machine_runs_the_checks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    # Without ``ranks``, whose processes would import torch again; a test below runs it on those that there are.
    names = ["solvers", "masked", "waiting", "group", "uploads", "layout", "exact", "evaluation", "resumed", "data"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", *program.PARTS, "--device", "cpu", "--quick", "--report",
         "--out", tmp_path / "out", "--only", ",".join(names)],
        cwd=runs.ROOT, env=runs.environment({"PYTHONPATH": f"{tmp_path}:{runs.ROOT}"}), capture_output=True,
        text=True, timeout=2 * runs.SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = [json.loads((tmp_path / "out" / f"gpu-{part}.json").read_text()) for part in program.PARTS]
    assert written[0]["meta"]["torch"] == torch.__version__
    rows = {row["check"]: row for part in written for row in part["rows"]}
    assert {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(names, "ok")
    assert re.search(r"none: data wait \d+\.\d\d%, \d+ images/s", rows["data"]["found"])
    text = (tmp_path / "out" / "gpu-check.md").read_text()
    assert text.rstrip().endswith("all that ran is as it must be")
    assert text in done.stdout


def _error(*alone: str) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    return exact.error(Runtime(Launch("test", rank, world, rank, world), CPU), alone=alone)


def test_ranks_are_one_batch_and_are_told_from_another():
    assert max(harness.run(2, _error)) < smoke.LIMIT
    assert min(harness.run(2, _error, "distillation.weight=30")) > 100 * smoke.LIMIT


def test_a_step_that_is_not_masked_is_found(monkeypatch):
    prepare = strategy._prepare
    monkeypatch.setattr(strategy, "_prepare", lambda optimizer, masked, rate: prepare(optimizer, 0 * masked, rate))
    with pytest.raises(CheckError, match="changed"):
        smoke.masked_step_changes_nothing(CPU, True)


def test_what_is_not_exact_is_found(monkeypatch):
    def rounded(x: torch.Tensor) -> torch.Tensor:  # to TF32's ten bits
        return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).to(x.dtype)

    matmul = torch.Tensor.__matmul__
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(rounded(a), rounded(b)))
        with pytest.raises(CheckError, match="L1 error"):
            smoke.solvers_agree(CPU, True)
    clipped = strategy.Strategy._clipped_norm

    def longer(self: strategy.Strategy, own: list[torch.nn.Parameter]) -> torch.Tensor:
        for _, p in self.parameters:
            if p.dtype == torch.float32:  # not the reference
                p.grad *= 1.001
        return clipped(self, own)

    monkeypatch.setattr(strategy.Strategy, "_clipped_norm", longer)
    with pytest.raises(CheckError, match="error of the gradient"):
        exact.step_is_exact(CPU, True)


def test_a_resumed_run_that_forgets_is_found(monkeypatch):
    load_state_dict = CheckpointManager._load_state_dict
    monkeypatch.setattr(
        CheckpointManager, "_load_state_dict", lambda self, state: load_state_dict(self, state | {"optimizer": {}})
    )
    with pytest.raises(CheckError, match="the resumed one elsewhere"):
        whole.resumed_run_is_the_same(CPU, True)


def test_what_would_wait_for_a_gpu_is_found(monkeypatch):
    # A solver that looks where the diffusion should have been queued, with its place.
    monkeypatch.setattr(manifold, "start_async", lambda *args: None)
    with pytest.raises(CheckError, match=r"wait: manifold/solvers.py:\d+ _local_scalar_dense"):
        smoke.step_does_not_wait(CPU, True)


@pytest.fixture
def main(monkeypatch):
    """The program, whose changes of the environment end with the test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return program.main


def test_each_check_is_written_at_once_and_the_rest_goes_on(main, monkeypatch, capsys, tmp_path):
    def broken(*given: object) -> str:
        raise RuntimeError("no kernel image is available")

    def missing(*given: object) -> str:
        raise Skipped("there is one GPU")

    def fine(*given: object) -> str:
        assert len(json.loads((tmp_path / "gpu-smoke.json").read_text())["rows"]) == 3  # what came before is on disk
        return "1"

    short = {"broken": broken, "off": lambda *_: within("error", 2.0, 1.0), "missing": missing, "fine": fine}
    monkeypatch.setattr(program, "checks", lambda part: short)
    arguments = ["smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*arguments, "--report"]) == 1
    said = capsys.readouterr()
    assert "failed  broken (0.0 s): RuntimeError: no kernel image is available" in said.out
    assert "failed  off (0.0 s): error 2.0e+00 (at most 1e+00)" in said.out
    assert "skipped missing (0.0 s): there is one GPU" in said.out
    assert re.search(r"smoke +fine +ok", (tmp_path / "gpu-check.md").read_text())
    assert said.out.rstrip().endswith("failed: broken, off")
    assert "Traceback" in said.err
    assert main([*arguments, "--only", "missing"]) == 0


def test_bad_usage_is_a_sentence(main, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["smoke", "--device", "cpu", "--out", "/dev/null/x"])
    monkeypatch.setitem(program.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match="2"):
        main(["smoke"])
    said = capsys.readouterr().err
    assert "cannot write to /dev/null/x: Not a directory" in said
    assert "no-such-package is not installed; pip install no-such-package" in said
