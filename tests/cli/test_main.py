"""Help and exit codes, and ``evaluate`` beside the run's own numbers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_obdsd.cli.main import COMMANDS
from dist_obdsd.cli.parser import parse
from dist_obdsd.config import registry
from tests import runs

HELP = """
import sys
from dist_obdsd.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("imported:", *{"torch", "pydantic", "numpy"} & set(sys.modules))
    sys.exit(end.code)
"""


def python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


PARTS = [registry.LOSSES, registry.TARGETS, registry.BACKBONES, registry.STRATEGIES]
SETTINGS = [text for part in PARTS for text in (part.setting, *part.paths)]


@pytest.mark.parametrize(("command", "names", "imported"), [("", list(COMMANDS), ""), ("train", SETTINGS, "pydantic")])
def test_help_names_what_there_is_and_imports_little(command: str, names: list[str], imported: str) -> None:
    done = python(HELP, *command.split(), "--help", capture_output=True, env=runs.environment())
    assert done.returncode == 0, done.stderr
    text, _, found = done.stdout.rpartition("imported:")
    assert found.strip() == imported
    assert all(f" {name}" in text for name in names)
    assert "reader" not in text  # a recipe's


def test_a_tilde_in_an_option_is_the_home_folder() -> None:
    options = parse(["pack", "glyphs", "--out=~/x", "--source=a~"])
    assert (options.out, options.source) == (Path.home() / "x", Path("a~"))


ENDING = """
import atexit, threading, time
from dist_obdsd.cli import main as cli
def main(arguments):
    threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()
    atexit.register(print, 'at exit')
    print('main')
    return CODE
cli.main = main
cli.program()
"""


def test_a_program_ends_after_its_threads_and_exit_handlers() -> None:
    done = python(ENDING.replace("CODE", "3"), capture_output=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split("\n") == ["main", "thread", "at exit", ""]
    with open("/dev/full", "w") as full:
        assert python(ENDING.replace("CODE", "0"), stdout=full).returncode == 1  # output that cannot be written


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG)
    reads, writes = os.pipe()
    os.close(reads)  # as head does
    done = subprocess.run(runs.command("status", "tiny.yaml"), stdout=writes, stderr=subprocess.PIPE, text=True,
                          cwd=tmp_path, env=runs.environment(), check=False)  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ("trian", "invalid choice: 'trian'"),
        ("train", "required: config\n"),  # overrides are not
        ("pack glyphs", "required: --out"),
        ("train a.yaml --nonsense", "--nonsense"),
        ("doctor tiny.yaml data.x=1", "unknown setting data.x"),
        ("doctor tiny.yaml data.shards=nowhere", "nowhere"),
        ("train tiny.yaml threads=99999", "threads is 99999"),  # it would crash torch
        ("train empty.yaml", "empty.yaml holds nothing"),
    ],
)
def test_bad_usage_exits_with_2(arguments: str, fact: str, folder: Path) -> None:
    (folder / "empty.yaml").touch()
    done = runs.program(*arguments.split(), cwd=folder)
    assert done.returncode == 2
    assert fact in done.stderr


def test_a_sentence_is_what_torchrun_ends_with(folder: Path) -> None:
    line = runs.command("train", "tiny.yaml", "data.shards=nowhere", ranks=2)
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=runs.environment(), check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip(" =")]
    assert "there is no shard folder nowhere" in lines[0]
    assert lines[-1].endswith(lines[0].removeprefix("dist-obdsd: "))
    assert "dist_obdsd/data" not in done.stderr  # no traceback of ours


def test_evaluate_gives_the_run_s_own_numbers(untouched: Callable[..., Path], shards: Path, tmp_path: Path) -> None:
    run = untouched()
    summary = json.loads((run / "summary.json").read_text())
    last = {row["metric"]: row["value"] for row in summary["rows"] if row["protocol"] == "last"}
    assert {"recall@1", "recall@2", "map@r"} <= last.keys()
    for ranks in (0, 2):
        done = runs.program("evaluate", run, "--shards", shards, "--json", "numbers.json", ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        written = json.loads((tmp_path / "numbers.json").read_text())
        assert {row["metric"]: row["value"] for row in written["rows"]} == last
