"""The output of a run: a bar on a terminal and lines elsewhere, through the real program."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
from contextlib import closing
from pathlib import Path

import pytest

from dist_obdsd import console
from dist_obdsd.training.progress_display import ProgressDisplay, build_display
from tests import runs
from tests.nursery import Program

COLOUR = re.compile("\x1b\\[\\d*m")
SHOWN = {
    80: r"epoch 2/2 \|.+\| \d/4, [\d,]+/s, wait \d+%, \d:\d\d:\d\d left, [\d.]+ \+ [\d.]+",
    110: r"epoch 2/2 \|.+\| \d/4, [\d,]+ images/s, \d+% data wait, [\d:]+ left, ranking [\d.]+, distillation [\d.]+",
}


def on_a_terminal(columns: int, *arguments: str, cwd: Path, **env: str) -> str:
    """Run the program with a pseudo-terminal as its output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in runs.environment({"TERM": "xterm"}).items() if k != "NO_COLOR"} | env
    with os.fdopen(theirs, "wb") as screen:
        process = Program(arguments, cwd=cwd, env=environment, stdout=screen, stderr=screen)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=runs.SECONDS) == 0, shown
    return shown.decode()


@pytest.mark.parametrize("columns", SHOWN)
def test_a_bar_on_a_terminal_and_lines_above_it(folder: Path, columns: int) -> None:
    settings = ("epochs=2", "tracking.every_steps=1", "data.workers=0", "validation.fraction=0.25")
    shown = on_a_terminal(columns, "train", "tiny.yaml", *settings, cwd=folder)
    lines = re.split(r"[\r\n]+", shown)
    assert any(re.fullmatch(SHOWN[columns], COLOUR.sub("", line)) for line in lines), shown
    assert "\x1b[32mfinished\x1b[0m: runs/tiny" in lines
    assert not any("step 1:" in line for line in lines)  # the bar says it
    # Lines stand alone: the bar was taken away before them.
    ended = [line for line in lines if re.fullmatch(r"epoch [12]/2: .* s, \d+ images/s, [\d.]+% data wait", line)]
    assert [re.findall(r"(\w+) 0?\d?\.\d{4}", line) for line in ended] == [["ranking"], ["ranking", "distillation"]]
    best = [line for line in lines if "best epoch so far" in line]
    assert best
    assert all(line.startswith("validation: ") for line in best)


def test_quiet_and_verbose(train) -> None:
    details = ("diffusion over 16 images", "of the reachable images")
    code, out, _ = train("--verbose", "epochs=2", "max_steps=8", "name=verbose")
    assert code == 0
    assert all(words in out for words in details)
    assert len([line for line in out.splitlines() if line.startswith("  step ")]) == 8
    code, out, err = train("epochs=2", "max_steps=8", "name=neither")
    assert code == 0
    assert not any(words in out for words in details)
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("  step")] == ["  step 0", "  step 5"]
    assert not re.search("[\r\x1b]| left,", out + err)  # no bar and no colour in a pipe
    code, out, _ = train("--quiet", "epochs=2", "name=quiet", "optim.lr=1e300", "optim.name=sgd")
    assert code == 1
    assert "is not finite, so the step was left out" in out
    assert "epoch 1" not in out
    code, out, _ = train("--quiet", "epochs=2", "max_steps=1", "name=quieter")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["protocol", "last"]
    with pytest.raises(SystemExit, match="2"):
        train("--quiet", "--verbose")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("is_main", "screen", "quiet", "shown"),
    [
        (True, io.StringIO(), False, (50, 0)),
        (True, Screen(), False, (0, 8)),
        (True, Screen(), True, (0, 0)),
        (False, Screen(), False, (0, 0)),
    ],
    ids=["pipe", "terminal", "quiet", "other rank"],
)
def test_what_fits_a_rank(monkeypatch: pytest.MonkeyPatch, is_main, screen, quiet, shown) -> None:
    monkeypatch.setattr(sys, "stderr", screen)
    display = build_display(is_main, 50, 8, quiet, verbose=False)
    assert (display.every, display.bar_size) == shown


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_colours_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "stderr", Screen())
    with closing(ProgressDisplay(1, 8)) as display, console.log_to_terminal():
        display.begin("epoch 1/1", 0, 4, 4)
        logging.getLogger("dist_obdsd.data").warning("it is cold")
    assert ("\x1b[33m" in sys.stderr.getvalue()) == (value == "xterm")
    assert ("\x1b[32m" in sys.stderr.getvalue()) == (value == "xterm")
