"""The report of a run: self-contained, complete, escaped; and its advice, case by case."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_obdsd.config import Config, parse_config
from dist_obdsd.figures.run_figures import draw
from dist_obdsd.figures.run_report import run_report, what_to_try
from tests import runs


def config(**settings: Any) -> Config:
    return parse_config({"name": "x", "epochs": 3, "data": {"shards": "s"}, **settings}, "test")


def summary(classes: float = 20, **scores: float) -> dict[str, Any]:
    row = {"split": "test", "epoch": 3, "metric": "map@r"}
    return {
        "meta": {"epochs": 3, "steps": 6, "validation_classes": classes},
        "rows": [row | {"protocol": protocol, "value": value} for protocol, value in scores.items()],
    }


def validation(epoch: int, score: float) -> dict[str, Any]:
    return {"kind": "validation", "step": 2 * epoch, "epoch": epoch, "recall@1": 0.5, "map@r": score}


def step(**numbers: float) -> dict[str, Any]:
    return {"kind": "step", "step": 0, "epoch": 2, "ranking": 1.0, "masked": 0.0, **numbers}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.images += [str(values["src"])] if tag == "img" else []
        self.links += [str(values[name]) for name in ("href", "src") if name in values and tag != "img"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a copy of the tiny run, which held out classes and has no test."""
    run = tmp_path_factory.mktemp("report") / "tiny"
    run.mkdir()
    for path in (trained / "runs" / "tiny").iterdir():
        if path.suffix in (".yaml", ".json", ".jsonl"):
            (run / path.name).write_bytes(path.read_bytes())
    paths, failures = draw(run)
    assert not failures
    assert paths[-1] == run / "report.html"
    return paths[-1].read_text()


def test_a_report_holds_everything_itself(report: str, trained: Path) -> None:
    page = Page(report)
    assert page.open == []
    assert page.links == []
    assert len(page.images) == 2  # losses and validation
    assert all(image.startswith("data:image/webp;base64,UklGR") for image in page.images)
    for row in runs.metrics(trained / "runs" / "tiny", "validation"):
        assert f"after epoch {row['epoch']}" in page.text
        assert f"{row['map@r']:.4f}" in page.text
    assert "samples_per_class: 2" in page.text
    assert "3 epochs" in page.text


def test_names_are_escaped_and_a_note_stands_once(tmp_path: Path) -> None:
    row = {"protocol": "last", "epoch": 3, "metric": "<b>/map@r", "value": 0.25, "note": "training made it worse"}
    rows = [row, row | {"metric": "recall@1"}, row | {"protocol": "untrained", "note": "no note"}]
    rows.append(row | {"protocol": "best_validation"})  # of the same epoch
    text = run_report(tmp_path, config(data={"shards": "a<b>&c"}), [], {"rows": rows})
    assert "<b>" not in text
    assert "<b>/map@r" in Page(text).text
    assert "0.2500" in text
    assert text.count("worse") == 1
    assert "not finished" in text


FINE = [validation(1, 0.3), validation(2, 0.4), step(target_kl_to_uniform=2.0, target_self_mass=0.3)]
TRIED = {"untrained": 0.1, "last": 0.4}


@pytest.mark.parametrize(
    ("metrics", "scores", "words"),
    [
        (FINE, TRIED, "after the last epoch, 2"),
        ([validation(1, 0.3), validation(2, 0.995)], TRIED, "0.9950"),
        (FINE, TRIED | {"classes": 4}, "Validation on 4 classes"),
        ([validation(1, 0.5), *FINE[1:]], TRIED, "after epoch 1 of 2"),
        ([step()], TRIED, "validation.fraction"),
        (FINE, {"last": 0.4}, "evaluation.untrained"),
        ([*FINE[:2], step(target_kl_to_uniform=0.1)], TRIED, "nearly uniform"),
        ([*FINE[:2], step(target_self_mass=0.97)], TRIED, "only the image itself"),
        ([*FINE, step(masked=1.0)], TRIED, "1 of 2 steps"),
        ([*FINE, {"kind": "epoch", "data_wait_share": 0.5}], TRIED, "data.workers"),
    ],
)
def test_advice_follows_the_numbers(metrics: list[Any], scores: dict[str, float], words: str) -> None:
    advice = list(what_to_try(config(), metrics, summary(**scores)))
    assert [text for text in advice if words in text]
    assert len(advice) <= 2
    fine = list(what_to_try(config(), FINE, summary(**TRIED)))
    assert len(fine) == 1
    assert words == "after the last epoch, 2" or words not in fine[0]
