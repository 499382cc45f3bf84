"""The real client and a real server, without a training run."""

import logging
import multiprocessing
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dist_obdsd.config import parse_config
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.event_log import UploadState
from dist_obdsd.tracking.mlflow_backend import absolute, connect, load_libraries, metric_name
from dist_obdsd.tracking.tracker import build_tracker
from dist_obdsd.tracking.uploader import replay

MANIFEST = "0123456789abcdef" * 4
TAGS = {"git_commit": "c" * 40, "git_dirty": "true", "launcher": "torchrun", "world_size": "2", "manifest": MANIFEST}
PATIENCE = 120  # seconds: the end of a run waits so long at most, however busy the machine is


@pytest.fixture
def job(tmp_path, server, caplog):
    """A run that is not trained: its events are made by hand."""
    caplog.set_level(logging.INFO, "dist_obdsd")
    return Job(tmp_path, server.uri, caplog)


class Job:
    def __init__(self, folder, uri, caplog):
        self.folder, self.uri, self.caplog = folder, uri, caplog
        self.run_dir = folder / "x"
        self.log = self.run_dir / event_log.NAME
        self.client = MlflowClient(uri)

    def tracker(self, run_id=None, **tracking):
        tracking = {"uri": self.uri, "wait_seconds": PATIENCE, "experiment": self.folder.name, **tracking}
        raw = {"name": "x", "output": str(self.folder), "epochs": 2, "data": {"shards": "s"}, "tracking": tracking}
        config = parse_config(raw, "test")
        self.run_dir.mkdir(exist_ok=True)
        return build_tracker(config, self.run_dir, MANIFEST, run_id, TAGS)

    def life(self, status, *losses, **tracking):
        """Track steps from the first one on, and the run's end; return its id."""
        tracker = self.tracker(**tracking)
        for step, loss in enumerate(losses):
            tracker.metrics({"loss": loss}, step)
        tracker.close(status)
        return tracker.run_id

    def said(self):
        """The messages since the last call."""
        said = [r.getMessage() for r in self.caplog.records if r.name.startswith("dist_obdsd")]
        self.caplog.clear()
        return said

    def replay(self, **options):
        replay(self.run_dir, **options)
        return self.said()[-1]

    def history(self, run_id, name):
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, name))

    def state(self):
        return UploadState.load(self.log, event_log.read_header(self.log))

    def forget(self, **changes):
        """Change what is known of the upload: by default, nothing is sent yet."""
        replace(self.state(), **({"sent": 0, "number": 0} | changes)).save(self.log)


def test_all_kinds_of_events_arrive_and_none_twice(job):
    tracker = job.tracker(experiment="odd: 'n\"ame %41 #?& ü 漢", parent="a" * 32)
    assert tracker.run_id.startswith("local-")
    tracker.params({f"p{i}": "v" * (7000 if i == 0 else 1) for i in range(150)})
    for step in range(120):  # more than are sent together, and more numbers than MLflow takes in one call
        tracker.metrics({f"m{i}": step + i for i in range(10)} | {"recall@1": 0.5, "not a number": float("nan")}, step)
    tracker.tags({"checkpoint.last": "/there (5 bytes)"})
    tracker.dataset("birds", MANIFEST, "/data/birds", {"splits": {"train": {"images": 3, "classes": 2}}})
    for path in ("figures/grid.png", "figures/map.png", "config.yaml"):
        (job.run_dir / path).parent.mkdir(exist_ok=True)
        (job.run_dir / path).write_bytes(b"there")
        tracker.artifact(job.run_dir / path)
    tracker.artifact(job.run_dir / "figures")
    tracker.close("FINISHED")
    assert job.said() == []
    run = job.client.get_run(tracker.run_id)
    assert job.client.get_experiment(run.info.experiment_id).name == "odd: 'n\"ame %41 #?& ü 漢"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "x")
    assert run.data.tags.items() >= (TAGS | {"checkpoint.last": "/there (5 bytes)"}).items()
    assert run.data.tags["mlflow.parentRunId"] == "a" * 32
    assert run.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert len(run.data.params) == 150
    assert len(run.data.params["p0"]) == 6000
    assert job.history(tracker.run_id, "m7") == [(step, step + 7) for step in range(120)]
    assert len(job.history(tracker.run_id, "recall_at_1")) == len(job.history(tracker.run_id, "not a number")) == 120
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("birds", MANIFEST[:36])
    assert MANIFEST in given.dataset.source
    assert '"images": 3' in given.dataset.profile
    assert {file.path for file in job.client.list_artifacts(tracker.run_id)} == {"config.yaml", "figures"}
    figures = {file.path for file in job.client.list_artifacts(tracker.run_id, "figures")}
    assert figures == {"figures/grid.png", "figures/map.png"}
    # All of it once more, as after a crash between an event and its acknowledgement.
    job.forget()
    assert f"sent {len(list(event_log.read_events(job.log)))} events" in job.replay()
    assert job.history(tracker.run_id, "m7") == [(step, step + 7) for step in range(120)]
    again = job.client.get_run(tracker.run_id)
    assert len(again.inputs.dataset_inputs) == 1
    assert again.info.end_time == run.info.end_time
    assert "nothing was missing" in job.replay()
    # And with the answer to the run's creation lost, too.
    job.forget(run_id=None)
    assert tracker.run_id in job.replay()
    assert len(job.client.search_runs([run.info.experiment_id])) == 1


def test_a_deleted_run_is_told_once_and_replayed_when_restored(job):
    run_id = job.life("KILLED")
    job.client.delete_run(run_id)
    tracker = job.tracker(run_id, wait_seconds=0.5)
    for step in range(3):
        tracker.metrics({"loss": step}, step)
    assert tracker.uploader.answered.wait(PATIENCE)
    tracker.close("FINISHED")
    tracker.uploader._thread.join(PATIENCE)
    first, last = job.said()
    assert f"the run was deleted: mlflow runs restore --run-id {run_id}" in first
    assert "lacks 5 of 7 events" in last
    with pytest.raises(RunError, match="was deleted"):
        job.replay()
    assert "sent 7 events" in job.replay(new_run=True)
    assert job.state().run_id != run_id
    job.forget(run_id=run_id)
    job.client.restore_run(run_id)
    job.replay()
    assert job.history(run_id, "loss") == [(0, 0), (1, 1), (2, 2)]
    assert job.client.get_run(run_id).info.status == "FINISHED"


def test_a_run_that_never_reached_its_server_is_replayed(job):
    local = job.life("KILLED", 1, 2, uri="http://127.0.0.1:9", wait_seconds=0.5)
    with pytest.raises(RunError, match=r"127.0.0.1:9: Connection refused; .* is sent up to event 0"):
        job.replay()
    job.replay(uri=job.uri)
    run_id = job.state().run_id
    assert job.client.get_run(run_id).info.status == "KILLED"
    # The checkpoint knows the local id only.
    tracker = job.tracker(local)
    assert tracker.run_id == run_id
    assert tracker.uploader.answered.wait(PATIENCE)
    with pytest.raises(InputError, match="a live run"):
        job.replay()
    tracker.metrics({"loss": 99}, 1)  # done again
    tracker.metrics({"loss": 3}, 2)
    tracker.close("FINISHED")
    assert job.history(run_id, "loss") == [(0, 1), (1, 2), (2, 3)]
    assert job.client.get_run(run_id).info.status == "FINISHED"
    # Another server gets all of it.
    job.uri = f"sqlite:///{job.folder}/other.db"
    job.client = MlflowClient(job.uri)
    job.replay(uri=job.uri)
    assert job.history(job.state().run_id, "loss") == [(0, 1), (1, 2), (2, 3)]


def test_a_killed_run_of_an_earlier_version_is_continued(job):
    tracker = job.tracker()
    tracker.metrics({"loss": 1}, 0)
    tracker.uploader.close(PATIENCE)  # and not the tracker: nobody logs its end
    assert job.client.get_run(tracker.run_id).info.status == "RUNNING"
    assert job.replay().endswith("ended as KILLED")
    assert job.client.get_run(tracker.run_id).info.status == "KILLED"
    job.log.write_text(job.log.read_text().replace('"dist-obdsd event log 1"', '"dist-obdsd spool 1"', 1))
    job.forget(sent=job.log.read_bytes().index(b"\n") + 1)
    again = job.tracker()
    again.metrics({"loss": 2}, 1)
    again.close("FINISHED")
    assert again.run_id == tracker.run_id
    assert job.history(again.run_id, "loss") == [(0, 1), (1, 2)]
    assert job.said() == []


def test_after_a_power_cut_the_log_goes_on_where_it_ends(job):
    run_id = job.life("KILLED", *range(30))
    job.log.write_bytes(b"".join(job.log.read_bytes().splitlines(keepends=True)[:3]))
    assert job.life("FINISHED", *range(60)) == run_id
    assert set(job.history(run_id, "loss")) == {(step, step) for step in range(60)}


def test_a_parent_may_be_told_by_its_local_id(job, caplog):
    parent = job.tracker()
    local, run_id = parent.run_id, parent.await_run_id()
    assert local != run_id
    (job.folder / "child").mkdir()
    child = Job(job.folder / "child", job.uri, caplog).life("FINISHED", parent=local, experiment=job.folder.name)
    parent.close("FINISHED")
    assert job.client.get_run(child).data.tags["mlflow.parentRunId"] == run_id


def test_a_log_of_another_run_is_kept_aside(job):
    first = job.life("KILLED", 1)
    job.log.write_text(job.log.read_text().replace('"epochs": 2', '"epochs": 3', 1))
    second = job.life("FINISHED", 2)
    (said,) = job.said()
    assert "(epochs: 3 -> 2)" in said
    assert "tracking-1.jsonl" in said
    assert second != first
    assert job.history(second, "loss") == [(0, 2)]
    replay(job.run_dir / "tracking-1.jsonl")
    assert first in job.said()[-1]


def test_three_runs_begin_a_database_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path}/new.db"
    load_libraries(uri)
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=connect, args=(uri,)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]


def test_a_database_in_a_folder_of_any_name(tmp_path, monkeypatch, job):
    here = tmp_path / "job%2Fmain #50%&c;d='ü what?now"
    here.mkdir()
    monkeypatch.chdir(here)
    tracker = job.tracker(uri="sqlite:///m.db")
    (job.run_dir / "note.txt").write_text("hello")
    tracker.metrics({"loss": 1}, 0)
    tracker.artifact(job.run_dir / "note.txt")
    tracker.close("FINISHED")
    assert MlflowClient(absolute("sqlite:///m.db")).get_metric_history(tracker.run_id, "loss")[0].value == 1
    assert {path.name for path in here.iterdir()} == {"m.db", "mlruns"}
    assert [path.read_text() for path in here.rglob("note.txt")] == ["hello"]
    assert not any((tmp_path / cut).exists() for cut in ("job", "job%2Fmain ", here.name.partition("?")[0]))


def test_a_database_that_cannot_be_opened_is_told_at_once(job):
    tracker = job.tracker(uri=f"sqlite:///{job.folder}/none/m.db", wait_seconds=0)
    assert tracker.uploader.answered.wait(PATIENCE)
    tracker.close("FINISHED")
    assert all("unable to open database file" in text for text in job.said())


def test_a_full_disk_never_stops_a_run(job, small_disk):
    job.folder, job.run_dir = small_disk, small_disk / "x"
    tracker = job.tracker(wait_seconds=0.5)
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2**20))
    tracker.metrics({f"metric {i}": i for i in range(1000)}, 0)
    tracker.close("FINISHED")
    assert any("metrics.jsonl has the numbers" in text for text in job.said())
    tracker.uploader._thread.join(PATIENCE)  # it may be inside of a call, and has the log open


def test_charts_lie_in_named_groups():
    # The UI sorts the groups by name: losses and validation come first.
    charts = {
        "ranking": "curves/loss_ranking", "ranking_pull": "curves/loss_ranking_pull",
        "validation/recall@1": "curves/validation_recall_at_1", "lr": "optimizer/lr", "ramp": "optimizer/ramp",
        "epoch/images_per_s": "speed/epoch_images_per_s", "seconds": "speed/step_seconds",
        "target_entropy": "target/entropy", "test/recall@1": "test/recall_at_1", "checkpoint/mib": "checkpoint_mib",
        "a(b)": "a_b_",
    }  # fmt: skip
    assert {name: metric_name(name) for name in charts} == charts


@pytest.mark.parametrize("uri", ["http://x", "sqlite:////a/b.db", "sqlite:///:memory:", "postgresql://u@h/d"])
def test_only_a_relative_path_is_made_absolute(uri):
    assert absolute(uri) == uri
    assert absolute("sqlite:///m.db?timeout=5") == f"sqlite:///{Path.cwd()}/m.db?timeout=5"
    assert absolute("sqlite:///~/m.db") == f"sqlite:///{Path.home()}/m.db"
