"""What is said where an optional package is missing. ``tests/gpu`` shows that runs and benches do without them."""

import io
import sys
from pathlib import Path

import pytest

from dist_obdsd import console
from dist_obdsd.cli import main as cli
from dist_obdsd.tracking.system_metrics import SystemMetrics
from dist_obdsd.training.progress_display import build_display


def test_a_command_says_which_package_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["pack", "glyphs", "--out", "glyphs"]) == 2
    error = capsys.readouterr().err
    assert "pack needs matplotlib" in error
    assert "Traceback" not in error


def test_another_module_that_is_missing_is_a_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", "lost")
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_lines_in_place_of_bars_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert console.has_bars()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert not console.has_bars()
    assert build_display(True, 50, 16, quiet=False, verbose=False).bar_size == 0
    with console.bar(3, "images", "verifying") as bar:
        bar.update(2)
        console.print_line("a warning", screen)
    assert screen.getvalue() == "a warning\n"


def test_a_node_is_watched_as_far_as_the_packages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "system_memory_usage_megabytes" in SystemMetrics().read()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert not any(name.startswith(("cpu", "system")) for name in SystemMetrics().read())
