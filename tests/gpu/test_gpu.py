"""The checks of a device: on a GPU where there is one, and their code on a CPU; and that each can fail."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_obdsd.manifold import targets as manifold
from dist_obdsd.training import strategy
from dist_obdsd.training.checkpoint_manager import CheckpointManager
from tests import bare, harness, runs
from tests.gpu import __main__ as program
from tests.gpu import bench, checks, feeding, ranks, solving, steps
from tests.gpu.rig import CPU, CheckError, Rig, Skipped, settings, within


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("name", checks.CHECKS)
def test_on_a_gpu(name: str) -> None:
    try:
        print(checks.CHECKS[name](torch.device("cuda", 0), False))
    except Skipped as reason:
        pytest.skip(str(reason))


def test_a_bare_machine_runs_every_check_and_bench(tmp_path: Path) -> None:
    # Without ``ranks``, whose processes would import torch again; the next test runs it on those that there are.
    alone = [name for name in checks.CHECKS if name not in ("ranks", "compiled")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--quick", "--budget", "1", "--out", tmp_path / "out",
         "--only", ",".join([*alone, "bench"])],
        cwd=Path(__file__).parents[2], env=runs.environment(bare.environment(tmp_path)), capture_output=True, text=True,
        timeout=2 * runs.SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert written["meta"]["torch"] == torch.__version__.partition("+")[0]
    checked, rest = written["rows"][: len(alone)], written["rows"][len(alone) :]
    measured, waited = rest[:-1], rest[-1]
    assert [(row["check"], row["verdict"]) for row in checked] == [(name, "ok") for name in alone]
    assert [row["variant"] for row in measured] == ["none", "psd", "obdsd"]
    assert all(row["ms"] > 0 and 0 < row["objective share"] < 1 for row in measured)
    assert 0 <= waited["data wait"] < 1
    text = (tmp_path / "out" / "gpu-check.md").read_text()
    assert f"|\n\n{bench.WAITING_MEANS}\n" in text
    assert text.rstrip().endswith("all that ran is as it must be")
    assert text in done.stdout
    assert all(done.stdout.count(f"ok      {name} (") == 1 for name in alone)


def test_ranks_are_one_batch_and_are_told_from_another(tmp_path: Path) -> None:
    target = "distillation.target=obdsd"
    for variant, weight in (("obdsd", 3), ("other", 30)):
        alone = Rig(settings("small_cnn", target, f"distillation.weight={weight}"), CPU)
        alone.take()
        torch.save(alone.gradients, tmp_path / variant)
    for found in harness.run(2, _errors, {"obdsd": target, "other": target}, str(tmp_path)):
        assert found["obdsd"] < ranks.LIMIT
        assert found["other"] > 100 * ranks.LIMIT


def _errors(variants: dict[str, str], folder: str) -> dict[str, float]:
    import torch.distributed as dist

    from dist_obdsd.distributed.launch import Launch, Runtime

    rank, world = dist.get_rank(), dist.get_world_size()
    return ranks.errors(Runtime(Launch("test", rank, world, rank, world), CPU), variants, folder)


def test_a_step_that_is_not_masked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = strategy._prepare
    monkeypatch.setattr(strategy, "_prepare", lambda optimizer, masked, rate: prepare(optimizer, 0 * masked, rate))
    with pytest.raises(CheckError, match="changed"):
        steps.masked_step_changes_nothing(CPU, True)


def test_what_is_not_exact_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(x: torch.Tensor) -> torch.Tensor:  # to TF32's ten bits
        return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).to(x.dtype)

    exact = torch.Tensor.__matmul__
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(rounded(a), rounded(b)))
        with pytest.raises(CheckError, match="L1 error"):
            solving.solvers_agree(CPU, True)
    clipped = strategy.Strategy._clipped_norm

    def longer(self: strategy.Strategy, own: list[torch.nn.Parameter]) -> torch.Tensor:
        for _, p in self.parameters:
            if p.dtype == torch.float32:  # not the reference
                p.grad *= 1.001
        return clipped(self, own)

    monkeypatch.setattr(strategy.Strategy, "_clipped_norm", longer)
    with pytest.raises(CheckError, match="error of the gradient"):
        steps.step_is_exact(CPU, True)


def test_a_resumed_run_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load_state_dict = CheckpointManager._load_state_dict

    def forgetful(self: CheckpointManager, state: dict) -> object:
        return load_state_dict(self, state | {"optimizer": {}})

    monkeypatch.setattr(CheckpointManager, "_load_state_dict", forgetful)
    with pytest.raises(CheckError, match="the resumed one elsewhere"):
        checks.CHECKS["resumed"](CPU, True)


def test_what_would_wait_for_a_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # A solver that looks where the series should have done, with its place.
    monkeypatch.setattr(manifold, "start_async", lambda *args: None)
    with pytest.raises(CheckError, match=r"obdsd waits \d times: manifold/solvers.py:\d+ _local_scalar_dense"):
        steps.step_does_not_wait(CPU, True)


def test_a_failure_is_an_exit_code_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(device: torch.device, quick: bool) -> str:
        raise RuntimeError("no kernel image is available")

    def missing(device: torch.device, quick: bool) -> str:
        raise Skipped("there is one GPU")

    short = {"broken": broken, "off": lambda *_: within("error", 2.0, 1.0), "missing": missing, "fine": lambda *_: "1"}
    monkeypatch.setattr(checks, "CHECKS", short)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "")
    arguments = ["--device", "cpu", "--only", ",".join(short), "--out", str(tmp_path)]
    assert program.main(arguments) == 1
    said = capsys.readouterr()
    assert "failed  broken (0.0 s): RuntimeError: no kernel image is available" in said.out
    assert "failed  off (0.0 s): error 2.0e+00 (at most 1e+00)" in said.out
    assert "skipped missing (0.0 s): there is one GPU" in said.out
    assert "| fine | ok |" in (tmp_path / "gpu-check.md").read_text()
    assert said.out.rstrip().endswith("failed: broken, off")
    assert "Traceback" in said.err
    assert program.main([*arguments[:2], "--only", "fine"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "exact,speed"], "--only names 'speed'; there are solvers, masked"),
        (["--budget", "0"], "--budget is 0; give the seconds"),
        (["--out", "/dev/null/x"], "cannot write to /dev/null/x: Not a directory"),
    ],
)
def test_bad_usage_is_a_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "")
    assert program.main(["--device", "cpu", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_a_cpu_can(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    assert program.main([]) == 2
    assert "torch finds no CUDA device here; --device cpu --quick" in capsys.readouterr().err


def test_targets_stand_beside_what_was_found() -> None:
    about = {"backbone": "resnet50", "pixels": 224, "variant": "obdsd", "compiled": False}
    rows = [
        about | {"B": 112, "overhead": 1.4, "objective share": 0.5},
        about | {"B": 448, "overhead": 1.3, "objective share": 0.021},
        {"backbone": "resnet50", "pixels": 224, "B": 448, "variant": "none", "overhead": 1.0},
        {"backbone": "resnet50", "pixels": 224, "B": 896, "skipped": "this GPU has too little memory for it"},
    ]
    gpu = {"backbone": "resnet50"}
    waits = [{"backbone": "small_cnn", "variant": "none", "data wait": 0.5}]
    waits += [gpu | {"variant": "none", "data wait": 0.01}, gpu | {"variant": "obdsd", "data wait": 0.015}]
    waits += [gpu | {"variant": "obdsd", "skipped": "no"}]
    (aim,) = bench.targets(waits)
    assert (aim["at most"], aim["found"]) == (0.02, 0.015)  # the larger one
    assert aim["target"].endswith("obdsd")
    found = bench.targets(rows)
    assert [(row["at most"], row["found"], row["verdict"]) for row in found] == [
        (1.3, 1.4, "missed"), (1.3, 1.3, "met"), (0.02, 0.021, "missed"),
    ]  # fmt: skip
    text = bench.markdown(("B", "variant", "overhead", "nothing"), rows).splitlines()
    assert text[0] == "| B | variant | overhead |"
    assert text[2] == "| 112 | obdsd | 1.4 |"
    assert text[-1] == "| 896 |  | this GPU has too little memory for it |"


def test_a_batch_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: object) -> list:
        if options.batch == bench.LARGE:
            raise bench.RunError("the case failed:\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate")
        return [{"B": 112, "variant": "none", "ms": 2.0, "objective": 1.0}]

    monkeypatch.setattr(bench.step, "run", run)
    first, second, third = bench.run(False, 10)
    assert first["objective share"] == 0.5
    assert (second["B"], second["compiled"], third["compiled"]) == (448, False, True)
    assert second["skipped"] == third["skipped"] == "this GPU has too little memory for it"


def test_what_was_measured_before_and_after_a_failure_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> list:
        if options.batch == bench.LARGE and not options.compile:
            raise bench.RunError(
                "the case failed:\nTraceback\n[rank0]: RuntimeError: no kernel image\nChildFailedError:\n"
            )
        row = {"B": options.batch, "variant": "none", "ms": 2.0, "objective": 1.0}
        return [row | {"compiled": False} if options.compile else row]

    def no_wait(device: torch.device, quick: bool) -> list:
        raise OSError("no space left on device\nsecond line")

    monkeypatch.setattr(bench.step, "run", run)
    monkeypatch.setattr(feeding, "data_wait", no_wait)
    failed: list[str] = []
    options = argparse.Namespace(only=["bench"], quick=False, budget=3.0)
    (first, second, third), waits, aims = program._measured(options, CPU, failed)
    assert failed == ["bench"]
    assert (first["compiled"], first["ms"], third["ms"]) == (False, 2.0, 2.0)
    assert third["compiled"] is False  # it was asked for, and the machine went on without
    assert (second["B"], second["skipped"]) == (448, "RuntimeError: no kernel image")
    assert waits == [{"skipped": "OSError: no space left on device", "failed": True}]
    assert aims == []
    assert "Traceback" in capsys.readouterr().err
    assert program._measured(argparse.Namespace(only=[], quick=False, budget=3.0), CPU, failed) == ([], [], [])


def test_a_run_that_fails_is_a_row_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path, row: dict, device: torch.device, quick: bool) -> dict:
        if row["variant"] == "obdsd":
            raise CheckError("dist-obdsd train exited with 1")
        return {"data wait": 0.25}

    monkeypatch.setattr(feeding, "_waited", half)
    monkeypatch.setattr(feeding, "make_jpegs", lambda images, classes, count, size: runs.make_images(images, 4))
    none, obdsd = feeding.data_wait(CPU, False)
    assert (none["variant"], none["data wait"]) == ("none", 0.25)
    assert (obdsd["variant"], obdsd["failed"]) == ("obdsd", True)
    assert "exited with 1" in obdsd["skipped"]
