"""The output of a run: a bar on a terminal and lines elsewhere, through the real program."""

import fcntl
import os
import pty
import re
import struct
import termios
from contextlib import suppress

import pytest

from tests import runs
from tests.nursery import Program

COLOUR = re.compile("\x1b\\[\\d*m")
SHOWN = {
    80: r"epoch 2/2 \|.+\| \d/4, [\d,]+/s, wait \d+%, \d:\d\d:\d\d left, [\d.]+ \+ [\d.]+",
    110: r"epoch 2/2 \|.+\| \d/4, [\d,]+ images/s, \d+% data wait, [\d:]+ left, ranking [\d.]+, distillation [\d.]+",
}


def on_a_terminal(columns, *arguments, cwd, env):
    """Run the program with a pseudo-terminal as its output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in runs.environment({"TERM": "xterm"}).items() if k != "NO_COLOR"} | env
    with os.fdopen(theirs, "wb") as screen:
        process = Program(arguments, cwd=cwd, env=environment, stdout=screen, stderr=screen)
    shown = b""
    with suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(timeout=runs.SECONDS) == 0, shown
    return shown.decode()


@pytest.mark.parametrize(("columns", "env"), [(80, {}), (80, {"TERM": "dumb"}), (110, {"NO_COLOR": "1"})])
def test_a_bar_on_a_terminal_and_lines_above_it(folder, columns, env):
    settings = ("epochs=2", "tracking.every_steps=1", "data.workers=0", "validation.fraction=0.25")
    shown = on_a_terminal(columns, "train", "tiny.yaml", *settings, cwd=folder, env=env)
    lines = re.split(r"[\r\n]+", shown)
    assert any(re.fullmatch(SHOWN[columns], COLOUR.sub("", line)) for line in lines), shown
    assert ("finished: runs/tiny" if env else "\x1b[32mfinished\x1b[0m: runs/tiny") in lines
    assert ("\x1b[32m" in shown) == (not env)
    assert not any("step 1:" in line for line in lines)  # the bar says it
    # Lines stand alone: the bar was taken away before them.
    ended = [line for line in lines if re.fullmatch(r"epoch [12]/2: .* s, \d+ images/s, [\d.]+% data wait", line)]
    assert [re.findall(r"(\w+) 0?\d?\.\d{4}", line) for line in ended] == [["ranking"], ["ranking", "distillation"]]
    assert {line.partition(":")[0] for line in lines if "best epoch so far" in line} == {"validation"}


def test_quiet_and_verbose(train):
    details = ("diffusion over 16 images", "of the reachable images")
    out = train("--verbose", "epochs=2", "max_steps=8", "name=verbose").stdout
    assert all(words in out for words in details)
    assert len([line for line in out.splitlines() if line.startswith("  step ")]) == 8
    done = train("epochs=2", "max_steps=8", "name=neither")
    out = done.stdout
    assert not any(words in out for words in details)
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("  step")] == ["  step 0", "  step 5"]
    assert not re.search("[\r\x1b]| left,", out + done.stderr)  # no bar and no colour in a pipe
    out = train("--quiet", "epochs=2", "name=quiet", "optim.lr=1e300", "optim.name=sgd", exits=1).stdout
    assert "is not finite, so the step was left out" in out
    assert "epoch 1" not in out
    out = train("--quiet", "epochs=2", "max_steps=1", "name=quieter").stdout
    assert [line.split()[0] for line in out.splitlines()] == ["protocol", "last"]
    with pytest.raises(SystemExit, match="2"):
        train("--quiet", "--verbose")
