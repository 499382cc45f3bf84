"""A step that went wrong, in debug mode and otherwise. In one process, through the command line."""

from dist_obdsd.manifold import targets as manifold
from tests import runs


def test_a_step_that_went_wrong_is_counted_and_ends_a_debug_run(train, folder, monkeypatch):
    real = manifold.target_rows

    def off(*arguments):
        found = real(*arguments)
        return manifold.DiffusionTarget(found.target_bB * 1.001, found.error_b)

    monkeypatch.setattr(manifold, "target_rows", off)
    code, out, _ = train("epochs=2")
    assert code == 0
    first = runs.metrics(folder / "runs" / "tiny", "step")
    defective = [row for row in first if row.get("target_defects")]
    assert len(defective) == len([row for row in first if row["epoch"] == 1])
    assert f"100.0% of the target's rows are not distributions (step {len(defective)} so)" in out
    for more, fact in (
        (["name=debug"], "rows are not distributions (step 1 so); debug=true stops here"),
        (["name=nan", "optim.lr=1e300", "optim.name=sgd"], "so the step was left out; debug=true stops here"),
    ):
        code, _, err = train("epochs=2", "debug=true", *more)
        assert code == 1
        assert fact in err
    assert runs.status(folder / "runs" / "debug")["state"] == "failed"
