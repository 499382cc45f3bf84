"""The real client and a real server, without a training run."""

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from dist_obdsd.config import parse_config
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.tracking import event_log as spools
from dist_obdsd.tracking.event_log import State
from dist_obdsd.tracking.mlflow_backend import absolute, metric_name
from dist_obdsd.tracking.tracker import MLflowTracker, Tracker, build_tracker
from dist_obdsd.tracking.uploader import replay

MANIFEST = "0123456789abcdef" * 4
TAGS = {"git_commit": "c" * 40, "git_dirty": "true", "launcher": "torchrun", "world_size": "2", "manifest": MANIFEST}


@pytest.fixture
def job(tmp_path, server):
    """A run that is not trained: its calls are made by hand."""
    return Job(tmp_path, server.uri)


class Job:
    def __init__(self, folder, uri):
        self.folder, self.uri, self.said = folder, uri, []
        self.client = MlflowClient(uri)

    def tracker(self, run_id=None, **tracking):
        tracking = {"uri": self.uri, "wait_seconds": 10, "experiment": self.folder.name, **tracking}
        settings = parse_config(
            {"name": "x", "output": str(self.folder), "epochs": 2, "data": {"shards": "s"}, "tracking": tracking},
            "test",
        )
        settings.run_dir.mkdir(exist_ok=True)
        return MLflowTracker(settings, settings.run_dir, MANIFEST, run_id, TAGS, self.said.append)

    def replay(self, uri=None, new_run=False):
        replay(self.folder / "x", uri, new_run, self.said.append)

    def history(self, run_id, name):
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, name))

    def state(self):
        path = self.folder / "x" / spools.NAME
        return State.load(path, spools.read_head(path))


def test_all_kinds_of_calls_arrive(job):
    tracker = job.tracker(experiment="odd: 'n\"ame %41 #?& ü 漢", parent="a" * 32)
    assert tracker.run_id.startswith("local-")
    tracker.params({f"p{i}": "v" * (7000 if i == 0 else 1) for i in range(150)})
    for step in range(60):
        tracker.metrics({f"m{i}": step + i for i in range(20)} | {"recall@1": 0.5, "not a number": float("nan")}, step)
    tracker.tags({"checkpoint.last": "/there (5 bytes)"})
    tracker.dataset("birds", MANIFEST, "/data/birds", {"splits": {"train": {"images": 3, "classes": 2}}})
    (job.folder / "x" / "figures").mkdir()
    (job.folder / "x" / "figures" / "grid.png").write_bytes(b"png")
    (job.folder / "x" / "config.yaml").write_text("name: x")
    tracker.artifact(job.folder / "x" / "figures")
    tracker.artifact(job.folder / "x" / "config.yaml")
    tracker.close("FINISHED")
    assert job.said == []
    run = job.client.get_run(tracker.run_id)
    assert job.client.get_experiment(run.info.experiment_id).name == "odd: 'n\"ame %41 #?& ü 漢"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "x")
    assert run.data.tags.items() >= (TAGS | {"checkpoint.last": "/there (5 bytes)"}).items()
    assert run.data.tags["mlflow.parentRunId"] == "a" * 32
    assert run.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert len(run.data.params) == 150
    assert len(run.data.params["p0"]) == 6000
    assert job.history(tracker.run_id, "m7") == [(step, step + 7) for step in range(60)]
    assert len(job.history(tracker.run_id, "recall_at_1")) == len(job.history(tracker.run_id, "not a number")) == 60
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("birds", MANIFEST[:36])
    assert MANIFEST in given.dataset.source
    assert '"images": 3' in given.dataset.profile
    assert {file.path for file in job.client.list_artifacts(tracker.run_id)} == {"config.yaml", "figures"}
    assert [file.path for file in job.client.list_artifacts(tracker.run_id, "figures")] == ["figures/grid.png"]
    # All of it once more, as after a crash between a call and its acknowledgement.
    before = job.history(tracker.run_id, "m7")
    state = job.state()
    state.sent = state.number = 0
    state.save(job.folder / "x" / spools.NAME)
    job.replay()
    assert f"sent {len(list(spools.calls(job.folder / 'x' / spools.NAME, 0)))} calls" in job.said[-1]
    assert job.history(tracker.run_id, "m7") == before
    again = job.client.get_run(tracker.run_id)
    assert len(again.inputs.dataset_inputs) == 1
    assert again.info.end_time == run.info.end_time
    job.replay()
    assert "nothing was missing" in job.said[-1]
    # And with the answer to the run's creation lost, too.
    state.run_id = None
    state.save(job.folder / "x" / spools.NAME)
    job.replay()
    assert tracker.run_id in job.said[-1]
    assert len(job.client.search_runs([run.info.experiment_id])) == 1


def test_a_deleted_run_is_told_once_and_replayed_when_it_is_back(job):
    tracker = job.tracker()
    tracker.close("KILLED")
    run_id = tracker.run_id
    job.client.delete_run(run_id)
    tracker = job.tracker(run_id)
    for step in range(3):
        tracker.metrics({"loss": step}, step)
    tracker.close("FINISHED")
    first, last = job.said
    assert f"the run {run_id} was deleted; mlflow runs restore --run-id {run_id}" in first
    assert "lacks 5 of 7 calls" in last
    with pytest.raises(RunError, match="was deleted"):
        job.replay()
    job.client.restore_run(run_id)
    job.replay()
    assert job.history(run_id, "loss") == [(0, 0), (1, 1), (2, 2)]
    assert job.client.get_run(run_id).info.status == "FINISHED"
    # A run that no restoring brings back is made anew, and gets everything.
    state = job.state()
    state.run_id, state.sent = "f" * 32, 0
    state.save(job.folder / "x" / spools.NAME)
    with pytest.raises(RunError, match=r"there is no run f+; `dist-obdsd replay --new-run`"):
        job.replay()
    job.client.delete_run(run_id)
    job.replay(new_run=True)
    other = job.state().run_id
    assert other != run_id
    assert job.history(other, "loss") == [(0, 0), (1, 1), (2, 2)]
    experiment = job.client.get_run(other).info.experiment_id
    job.client.delete_experiment(experiment)
    with pytest.raises(RunError, match=f"mlflow experiments restore --experiment-id {experiment}"):
        job.replay(new_run=True)
    assert len(job.client.search_runs([experiment], run_view_type=ViewType.ALL)) == 2


def test_a_run_that_never_reached_its_server_is_replayed_and_continued(job, tmp_path):
    tracker = job.tracker(uri="http://127.0.0.1:9", wait_seconds=0.5)
    tracker.metrics({"loss": 1}, 0)
    tracker.metrics({"loss": 2}, 1)
    tracker.close("KILLED")
    local = tracker.run_id
    assert local.startswith("local-")
    with pytest.raises(RunError, match=r"127.0.0.1:9: Connection refused; .* is sent up to call 0"):
        job.replay()
    job.replay(uri=job.uri)
    run_id = job.state().run_id
    assert job.client.get_run(run_id).info.status == "KILLED"
    # The checkpoint knows the local id only.
    tracker = job.tracker(local)
    assert tracker.run_id == run_id
    with pytest.raises(InputError, match="a live run"):
        wait_until_it_sends(job)
    tracker.metrics({"loss": 99}, 1)  # done again
    tracker.metrics({"loss": 3}, 2)
    tracker.close("FINISHED")
    assert job.history(run_id, "loss") == [(0, 1), (1, 2), (2, 3)]
    assert job.client.get_run(run_id).info.status == "FINISHED"
    # Another server gets all of it.
    other = Job(tmp_path, f"sqlite:///{tmp_path}/other.db")
    other.replay(uri=other.uri)
    assert other.history(other.state().run_id, "loss") == [(0, 1), (1, 2), (2, 3)]


def wait_until_it_sends(job):
    import time

    for _ in range(200):
        job.replay()
        time.sleep(0.05)


def test_a_parent_may_be_told_by_its_local_id(job, tmp_path):
    parent = job.tracker()
    local, run_id = parent.run_id, parent.reach()
    assert local.startswith("local-")
    assert job.client.get_run(run_id).info.run_name == "x"
    (tmp_path / "child").mkdir()
    child = Job(tmp_path / "child", job.uri)
    tracker = child.tracker(parent=local, experiment=job.folder.name)
    tracker.close("FINISHED")
    parent.close("FINISHED")
    assert job.client.get_run(tracker.run_id).data.tags["mlflow.parentRunId"] == run_id


def test_a_run_that_was_killed_ends_as_killed(job):
    tracker = job.tracker()
    tracker.metrics({"loss": 1}, 0)
    tracker._writer.close(10)  # and not the tracker: nobody says how it ended
    assert job.client.get_run(tracker.run_id).info.status == "RUNNING"
    job.replay()
    assert job.said == [job.said[-1]]
    assert job.said[-1].endswith("ended as KILLED")
    assert job.client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_spool_of_another_run_is_kept_aside_and_not_replayed_into_this_one(job):
    tracker = job.tracker()
    tracker.metrics({"loss": 1}, 0)
    tracker.close("KILLED")
    first = tracker.run_id
    path = job.folder / "x" / spools.NAME
    head, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(head.replace('"epochs": 2', '"epochs": 3') + "".join(rest))
    tracker = job.tracker()
    tracker.metrics({"loss": 2}, 0)
    tracker.close("FINISHED")
    assert "is not of this run (epochs: 3 -> 2), so it is kept as tracking-1.jsonl" in job.said[0]
    assert tracker.run_id != first
    assert job.history(tracker.run_id, "loss") == [(0, 2)]
    replay(job.folder / "x" / "tracking-1.jsonl", None, False, job.said.append)
    assert first in job.said[-1]
    # A spool that was copied over this one has another id than the state beside it.
    (job.folder / "x" / "tracking-1.jsonl").replace(path)
    with pytest.raises(InputError, match="is of run"):
        job.replay()


def test_a_read_only_store_and_a_full_disk_never_stop_a_run(job, tmp_path, small_disk, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow takes such a URI for a relative path, too, and makes its folders
    MlflowClient(f"sqlite:///{tmp_path}/there.db").search_experiments()
    tracker = job.tracker(uri=f"sqlite:///file:{tmp_path}/there.db?mode=ro&uri=true", wait_seconds=0.5)
    tracker.metrics({"loss": 1}, 0)
    tracker.close("FINISHED")
    first, last = job.said
    assert "readonly database; the run goes on" in first
    assert "(readonly database); `dist-obdsd replay" in last
    job.folder, job.said = small_disk, []
    tracker = job.tracker(wait_seconds=0.5)
    for step in range(100):
        tracker.metrics({f"metric {i}": step for i in range(1000)}, step)
    tracker.close("FINISHED")
    assert "its spool cannot be written" in job.said[0]
    tracker._writer._thread.join(20)  # it may be inside of a call, and has the spool open


def test_only_the_main_rank_has_a_tracker(tmp_path):
    settings = parse_config({"name": "x", "output": str(tmp_path), "epochs": 2, "data": {"shards": "s"}}, "test")
    other = build_tracker(settings, settings.run_dir, MANIFEST, None, {}, False, print)
    assert type(other) is Tracker
    other.metrics({"a": 1.0}, 0)
    other.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_names_and_places():
    assert metric_name("test/recall@1") == "test/recall_at_1"
    assert metric_name("a(b)") == "a_b_"
    for uri in ("http://x", "sqlite:////a/b.db", "sqlite:///:memory:", "postgresql://u@h/d"):
        assert absolute(uri) == uri
    assert absolute("sqlite:///m.db").endswith("/m.db")
    assert absolute("sqlite:///m.db").startswith("sqlite:////")
