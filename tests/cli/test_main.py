import json
import os
import subprocess
import sys

import pytest

from tests import runs
from tests.training.conftest import folder, shards  # noqa: F401


def test_help_answers_without_importing_torch():
    script = (
        "import sys\nfrom dist_obdsd.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    names = (
        "pack",
        "verify",
        "train",
        "compare",
        "evaluate",
        "embed",
        "export",
        "figures",
        "bench",
        "doctor",
        "replay",
    )
    for command in names:
        assert f"    {command}" in done.stdout


def test_the_end_of_a_program_waits_for_threads_and_is_heard_by_whoever_asked_for_it():
    script = (
        "import atexit, threading, time\nfrom dist_obdsd.cli import main as cli\n"
        "def main(arguments):\n"
        "    threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "    atexit.register(print, 'at exit')\n    print('main')\n    return 3\n"
        "cli.main = main\ncli.program()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split("\n") == ["main", "thread", "at exit", ""]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script.replace("3", "0")], stdout=full, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["pack", "glyphs"], ["train", "a.yaml", "--nonsense"]])
def test_bad_usage_exits_with_2(arguments, tmp_path):
    assert runs.program(*arguments, cwd=tmp_path).returncode == 2


def test_evaluate_gives_the_run_s_own_numbers_alone_and_on_two_ranks(folder, shards):  # noqa: F811
    runs.train(folder, "validation.fraction=0.25")
    summary = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())
    last = {row["metric"]: row["value"] for row in summary["rows"] if row["protocol"] == "last"}
    assert {"recall@1", "recall@2", "map@r"} <= last.keys()
    assert {row["protocol"] for row in summary["rows"]} == {"last", "best_validation"}
    for ranks in (0, 2):
        arguments = ("evaluate", "runs/tiny", "--shards", shards, "--json", f"{ranks}.json")
        done = runs.program(*arguments, ranks=ranks, cwd=folder, anew=ranks > 0)
        assert done.returncode == 0, done.stderr
        written = json.loads((folder / f"{ranks}.json").read_text())
        assert {row["metric"]: row["value"] for row in written["rows"]} == last
    done = runs.program("evaluate", "runs/tiny", "--shards", shards, "--split", "other", cwd=folder)
    assert done.returncode == 2
    assert "it has train, test" in done.stderr


def test_doctor_tells_where_a_config_can_run(folder):  # noqa: F811
    done = runs.program("doctor", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    import torch

    assert torch.__version__.split("+")[0] in done.stdout
    assert "1, 2, 4 ranks" in done.stdout
    assert runs.program("doctor", "tiny.yaml", "data.shards=nowhere", cwd=folder).returncode == 2


def test_local_rank_before_the_command_is_accepted(folder):  # noqa: F811
    done = runs.program("--local_rank=0", "train", "tiny.yaml", "max_steps=1", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_deepspeed_launcher_starts_two_ranks(folder):  # noqa: F811
    """The real launcher, on CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "dist_obdsd", "train",
         "tiny.yaml", "max_steps=3"],
        capture_output=True, text=True, timeout=180, check=False, cwd=folder,
        env=runs.environment({"DS_ACCELERATOR": "cpu"}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu (deepspeed)" in done.stdout
    assert len(runs.metrics(folder / "runs" / "tiny", "step")) == 3


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG)
    reads, writes = os.pipe()
    os.close(reads)  # as head does
    done = subprocess.run(runs.command("status", "tiny.yaml"), stdout=writes, stderr=subprocess.PIPE, text=True,
                          cwd=tmp_path, env=runs.environment(), check=False)  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")
