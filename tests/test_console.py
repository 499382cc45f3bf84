import io
import logging
import os
import re
import sys
import termios

import pytest

from dist_obdsd import console
from dist_obdsd.training.progress_display import build_display

logger = logging.getLogger("dist_obdsd.some.module")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_a_bar_is_shown_on_a_terminal_alone(screen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen)
    with console.log_to_terminal(), console.bar(3, "images", "verifying") as bar:
        bar.update(2)
        logger.warning("a warning")
    text = screen.getvalue()
    if screen.isatty():
        assert "a warning\n" in text
        assert re.search("verifying.* 2/3", text)
    else:
        assert text == "dist-obdsd: a warning\n"


def test_lines_in_place_of_bars_without_tqdm(monkeypatch):
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


@pytest.mark.parametrize("lines", [0, 24])
def test_lines_stand_in_where_a_terminal_has_no_size(lines, monkeypatch, capsys):
    screen, other = os.openpty()
    termios.tcsetwinsize(screen, (lines, 80))
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with open(other, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with console.log_to_terminal(), console.bar(3000, "images", "verifying") as bar:
            bar.update(2000)
    os.close(screen)
    assert capsys.readouterr().out == ("" if lines else "verifying: 2,000 of 3,000 images\n")


@pytest.mark.parametrize(
    ("is_main", "quiet", "out"),
    [(True, False, "news\nresult\n"), (True, True, "result\n"), (False, False, ""), (False, True, "")],
)
def test_levels_decide_which_rank_prints(is_main, quiet, out, capsys):
    with console.log_to_terminal(is_main, quiet):
        logger.debug("detail")
        logger.info("news")
        logger.log(console.NOTICE, "result")
        logger.warning("trouble")
    logger.info("after the block")
    assert capsys.readouterr() == (out, "dist-obdsd: trouble\n")
