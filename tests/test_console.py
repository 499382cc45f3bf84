import io
import sys

import pytest

from dist_obdsd import console as progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bar(3, "images", "verifying") as bar:
            bar.update(2)
            bar.refresh()
            progress.say("dist-obdsd: a warning")
        text = stream.getvalue()
        assert ("verifying" in text and "2/3" in text) == shown
        assert "dist-obdsd: a warning\n" in text
        if not shown:
            assert text == "dist-obdsd: a warning\n"


def test_rates() -> None:
    assert progress.rate(3000, 12_500_000, 2.5) == "2.5 s, 1,200 images/s, 5.0 MB/s"
