"""Training and measuring with five packages alone, and what says which package is missing."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from dist_obdsd import cli, progress
from dist_obdsd.tracking.usage import Usage
from dist_obdsd.training.terminal import Lines, build_terminal
from tests import bare, runs

RUN = """
import sys
from dist_obdsd.cli import main

assert main(["pack", "folder", "--source", "images", "--out", "packed", "--workers", "1"]) == 0
assert main(["train", "tiny.yaml", "max_steps=8", "precision=bf16"]) == 0
assert main(["evaluate", "runs/tiny", "--shards", "packed", "evaluation.backend=torch"]) == 0
hidden = sys.argv[1].split(",")
found = {name.partition(".")[0] for name in sys.modules}
assert not found & set(hidden), found & set(hidden)
try:
    import tqdm
except ModuleNotFoundError:
    print("bare")
"""


def test_a_run_and_its_evaluation_need_five_packages(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "images")
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", "packed"))
    (tmp_path / "site").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(bare.HIDDEN)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=runs.environment(bare.environment(tmp_path / "site")), timeout=runs.SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "bare"
    assert "last" in done.stdout


@pytest.mark.parametrize(
    ("package", "module", "arguments"),
    [
        ("matplotlib", "matplotlib", ["pack", "glyphs", "--out", "glyphs"]),
        ("scipy", "scipy.io", ["pack", "cars196", "--source", "cars", "--out", "packed"]),
    ],
)
def test_a_command_says_which_package_it_lacks(
    package: str, module: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "cars" / "devkit").mkdir(parents=True)
    (tmp_path / "cars" / "cars_annos.mat").write_bytes(b"MATLAB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"pack needs {package} for this, which is not installed; pip install {package}" in error
    assert "Traceback" not in error


def test_another_module_that_is_missing_is_a_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(options: object) -> int:
        raise ModuleNotFoundError("No module named 'dist_obdsd.lost'", name="dist_obdsd.lost")

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_lines_in_place_of_bars_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert progress.has_bars()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert not progress.has_bars()
    assert type(build_terminal(True, 50, 16, quiet=False, verbose=False)) is Lines
    with progress.bar(3, "images", "verifying") as bar:
        bar.update(2)
        progress.say("a warning")
    assert screen.getvalue() == "a warning\n"


def test_a_node_is_watched_as_far_as_the_packages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "system_memory_usage_megabytes" in Usage().read()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert not any(name.startswith(("cpu", "system")) for name in Usage().read())
