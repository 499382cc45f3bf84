"""The tests' own way of starting programs: what they are told of a program must be so."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import harness, runs
from tests.nursery import Program


def start(code: str, folder: Path, *arguments: str, **env: str) -> Program:
    with (folder / "out").open("ab") as out:
        return Program(arguments, cwd=folder, env=os.environ | env, stdout=out, stderr=out, code=code)


def test_a_program_has_its_own_arguments_environment_and_folder(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.environ['WORD'], os.getcwd(), os.getsid(0) == os.getpid())"
    assert start(code, tmp_path, "a", "b c", WORD="ö").wait(60) == 0
    assert start(code, tmp_path).wait(60) == 1  # and nothing stays of the one before
    said = (tmp_path / "out").read_text().splitlines()
    assert said[0] == f"['-c', 'a', 'b c'] ö {tmp_path} True"
    assert said[-1] == "KeyError: 'WORD'"


def test_its_end_is_told_whatever_it_was(tmp_path: Path) -> None:
    sleeps = start("import time; time.sleep(60)", tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        sleeps.wait(0.01)
    assert sleeps.poll() is None
    assert start("raise SystemExit(7)", tmp_path).wait(60) == 7
    assert start("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path).wait(60) == -signal.SIGSEGV
    sleeps.send_signal(signal.SIGTERM)
    assert sleeps.wait(60) == -signal.SIGTERM
    done = runs.program("status", "none.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.yaml" in done.stderr


def fails(rank: int, how: str) -> int:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        if how == "dies":
            os._exit(3)
        raise ValueError("on purpose")
    return dist.get_rank()


@pytest.mark.parametrize(("how", "words"), [("raises", "ValueError: on purpose"), ("dies", "ended with 3")])
def test_a_rank_that_fails_is_named_and_the_next_group_is_sound(how: str, words: str) -> None:
    assert harness.run(2, fails, 2, how) == [0, 1]
    with pytest.raises(AssertionError, match=f"rank 1:\n(.*\n)*.*{words}"):
        harness.run(2, fails, 1, how)
    assert harness.run(2, fails, 2, how) == [0, 1]
