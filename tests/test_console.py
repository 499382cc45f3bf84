import io
import logging
import os
import sys
import termios

import pytest

from dist_obdsd import console

logger = logging.getLogger("dist_obdsd.some.module")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_a_bar_is_shown_on_a_terminal_alone(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen)
    with console.log_to_terminal(), console.bar(3, "images", "verifying") as bar:
        bar.update(2)
        if screen.isatty():
            bar.refresh()
        logger.warning("a warning")
    text = screen.getvalue()
    assert "a warning\n" in text
    if screen.isatty():
        assert "verifying" in text
        assert "2/3" in text
    else:
        assert text == "dist-obdsd: a warning\n"


@pytest.mark.parametrize("lines", [0, 24])
def test_lines_stand_in_where_a_terminal_has_no_size(
    lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_levels_decide_which_rank_prints(
    is_main: bool, quiet: bool, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.log_to_terminal(is_main, quiet):
        logger.debug("detail")
        logger.info("news")
        logger.log(console.NOTICE, "result")
        logger.warning("trouble")
    logger.info("after the block")
    assert capsys.readouterr() == (out, "dist-obdsd: trouble\n")
