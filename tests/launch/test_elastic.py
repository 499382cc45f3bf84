"""torchrun starts ranks again after one was killed; and what was killed on two ranks goes on with one and with four."""

import shutil
import subprocess
from contextlib import suppress

import psutil
import pytest

from tests import chaos, runs
from tests.launch.test_launchers import finished, start, wait_for

SETTINGS = ("epochs=4", "data.workers=0", "checkpoint.every_steps=2")


def ranks_below(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # one that ends just now
            found[child.environ().get("RANK", "")] = child
    found.pop("", None)
    return found


def test_a_killed_rank_restarts_and_other_world_sizes_go_on(folder, train):
    runs.train(folder, "name=whole", *SETTINGS, ranks=2)
    whole, run = (folder / "runs" / name for name in ("whole", "tiny"))

    process = start("torchrun.sh", *SETTINGS, cwd=folder, env={"RESTARTS": "1"})
    wait_for(process, lambda: chaos._steps(run) >= 9)
    first = ranks_below(process)
    first["1"].kill()
    psutil.wait_procs(list(first.values()), timeout=runs.SECONDS)
    for ranks in (1, 4):  # what the killed ranks left, before torchrun's next ones go on with it
        shutil.copytree(run, folder / f"on{ranks}" / "tiny")
    wait_for(process, lambda: len(ranks_below(process)) == 2)
    second = ranks_below(process)
    # In a store that outlived them, the new ranks could find the addresses of the old ones, and wait for ghosts.
    assert {rank.environ()["TORCHELASTIC_USE_AGENT_STORE"] for rank in second.values()} == {"False"}
    output = finished(process)
    assert process.returncode == 0, output
    assert "resuming runs/tiny from " in output
    assert chaos.difference(chaos.result(whole), chaos.result(run)) is None

    expected = [(row["step"], row["ranking"]) for row in runs.metrics(whole, "step")]
    code, said, _ = train(*SETTINGS, "output=on1")
    assert code == 0
    assert "resuming on1/tiny" in said
    runs.train(folder, *SETTINGS, "output=on4", ranks=4)
    for ranks in (1, 4):
        found = [(row["step"], row["ranking"]) for row in runs.metrics(folder / f"on{ranks}" / "tiny", "step")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-9, abs=1e-9)
