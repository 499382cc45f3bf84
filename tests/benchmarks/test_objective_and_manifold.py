"""The benchmarks of the objective and the manifold on small sizes, and what their findings mean."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import manifold, objective
from tests.manifold.data import unit_rows


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(benchmark, *arguments):
    assert benchmark.main([*map(str, arguments)]) == 0


def test_objective_compares_three_implementations_in_one_run(tmp_path, capfd):
    run(objective, "--sizes", "16,64", "--budget", 5, "--json", tmp_path / "o.json")
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["meta"]["torch"] == torch.__version__
    rows = written["rows"]
    ways = {(row["B"], row["variant"], row["implementation"]) for row in rows}
    assert {(16, "obdsd", "dist-obdsd"), (64, "obdsd", "loop and inverse")} <= ways
    assert (64, "none", "pytorch-metric-learning") in ways
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["implementation"] == "dist-obdsd"} == {1.0}
    assert "loop and inverse" in capfd.readouterr().out


def test_a_library_that_is_not_there_is_left_out_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(objective, "has_library", lambda: False)
    run(objective, "--sizes", "8", "--dim", "4", "--budget", 1)
    said = capfd.readouterr().out
    assert said.count("pytorch-metric-learning is not installed; pip install pytorch-metric-learning") == 1
    assert "share of loop and inverse, none, B=8" in said


def test_what_the_objective_is_compared_with_is_the_same_mathematics():
    E_BD, T_BD = unit_rows(0, 16, 8), unit_rows(1, 16, 8)
    labels_B = torch.arange(16) // 2
    for variant in objective.VARIANTS:
        values, gradients = [], []
        for way in objective.implementations(variant, T_BD, labels_B).values():
            leaf_BD = E_BD.clone().requires_grad_()
            values.append(way(leaf_BD))
            gradients.append(torch.autograd.grad(values[-1], leaf_BD)[0])
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-10)
        assert (gradients[1] - gradients[0]).abs().max() < 1e-10 * gradients[0].abs().max()


def test_implementations_take_turns_in_blocks(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(objective, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def way(name, seconds):
        def call(E_BD):
            calls.append(name)
            now[0] += seconds + (len(calls) == 1)  # what a first call costs ends its block
            return E_BD.sum()

        return call

    ways = {"quick": way("quick", 0.001), "slow": way("slow", 0.04), "slowest": way("slowest", 60)}
    seconds = objective.fastest(ways, unit_rows(0), budget=0)
    turn = [(name, len(list(run))) for name, run in itertools.groupby(calls)]
    rest = [("slow", 3), ("slowest", 1)]
    assert turn == [("quick", 1), *rest, ("quick", 20), *rest]
    assert seconds == pytest.approx({"quick": 0.001, "slow": 0.04, "slowest": 60})


def test_manifold_measures_a_rank_s_share_by_solver(tmp_path, capfd):
    run(manifold, "--sizes", "64", "--worlds", "1,8", "--json", tmp_path / "m.json")
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert {(row["B"], row["W"], row["b"], row["solver"]) for row in rows} == {
        (64, W, 64 // W, solver)
        for W in (1, 8)
        for solver in ("cholesky", "cg", "inverse")
        if W == 1 or solver != "inverse"
    }
    for row in rows:
        assert row["error"] < 2e-4
        assert row["seconds"] > 0
        assert row["peak_mib"] > 100  # the libraries alone
        assert (row["iterations"] > 0) == (row["solver"] == "cg")
    assert "iterations" in capfd.readouterr().out


def test_what_would_take_too_long_or_too_much_is_said_and_not_tried():
    known = [{"B": 1000, "W": 1, "b": 1000, "solver": "cholesky", "seconds": 2.0}]
    known += [{"B": 1000, "W": 1, "b": 1000, "solver": "cg", "seconds": 2.0}]
    case = {"B": 4000, "W": 1, "b": 4000}
    assert manifold.too_long(case | {"solver": "cholesky"}, known, 100) == "would take about 128 s"
    assert manifold.too_long(case | {"solver": "cg"}, known, 100) == "would take about 128 s"
    assert manifold.too_long(case | {"solver": "cg"}, known, 200) is None
    assert manifold.too_long(case | {"solver": "inverse"}, known, 1) is None
    assert manifold.too_large(10**6, 1, "cholesky").endswith("GiB")
    assert manifold.too_large(128, 1, "cholesky") is None


def test_findings_are_slopes_of_logarithms():
    rows = [{"B": B, "b": 512, "solver": "cg", "seconds": 3e-9 * B**2} for B in (4096, 8192, 32768)]
    rows += [{"B": B, "b": B, "solver": "inverse", "seconds": 1e-10 * B**3} for B in (1024, 4096)]
    rows += [{"B": 16384, "b": 512, "solver": "cg", "skipped": "too long"}]
    found = manifold.findings(rows)
    assert found["exponent at 512 rows a rank"] == pytest.approx(2)
    assert found["exponent of the inverse"] == pytest.approx(3)
    assert manifold.findings(rows[:1]) == {}


def test_a_regression_is_an_exit_code(tmp_path, capsys):
    arguments = ["--sizes", "16", "--dim", "8", "--budget", "2"]
    assert objective.main([*arguments, "--json", str(tmp_path / "now.json")]) == 0
    kept = json.loads((tmp_path / "now.json").read_text())
    shares = {name: value for name, value in kept["meta"].items() if name.startswith("share of")}
    assert len(shares) == 4  # three arms beside the loop, one beside another library
    kept["meta"] |= {name: value / 100 for name, value in shares.items()}
    (tmp_path / "better.json").write_text(json.dumps(kept))
    assert objective.main([*arguments, "--baseline", str(tmp_path / "better.json")]) == 1
    assert capsys.readouterr().out.count("worse") == 4


def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(tmp_path, capfd):
    assert objective.main(["--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "its folder does not exist" in capfd.readouterr().err
