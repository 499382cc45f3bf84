"""The event log on disk: what is written once, cut, torn, damaged, and read back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_obdsd.errors import InputError
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.event_log import EventLog, UploadState


def header(run="local-1"):
    return {"format": event_log.FORMATS[0], "run": run, "uri": "http://127.0.0.1:1", "config": {}, "manifest": "m"}


def events(path):
    return [event for event, _ in event_log.read_events(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / event_log.NAME


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=5))
def test_a_parameter_and_a_step_s_metric_are_written_once(tmp_path_factory, lives):
    """Each life does some steps, of which the next one repeats some, and is killed within its last line."""
    path = tmp_path_factory.mktemp("log") / event_log.NAME
    first, done = header(), 0
    expected = {}
    for number, (steps, again, torn) in enumerate(lives):
        log = EventLog(path, first)
        start = max(0, done - again)
        for step in range(start, start + steps):
            values = {"loss": step / 7, "seconds": number + step / 10}
            log.append("metrics", step=step, values=values)
            log.append("params", values={"lr": str(number)})
            expected.setdefault(step, values)
        done = max(done, start + steps)
        log.close()
        with path.open("ab") as file:
            file.write((json.dumps({"n": 99, "kind": "metrics", "step": 1, "values": {}}) + "\n")[:torn].encode())
    EventLog(path, first).append("end", status="FINISHED")
    found = events(path)
    metrics = [event for event in found if event["kind"] == "metrics"]
    assert {event["step"]: event["values"] for event in metrics} == expected
    assert len(metrics) == len(expected)
    assert [event["values"] for event in found if event["kind"] == "params"] == [{"lr": "0"}]
    assert [event["n"] for event in found] == list(range(1, len(expected) + 3))
    assert event_log.read_header(path) == first


def test_a_damaged_line_is_refused(path):
    EventLog(path, header()).append("end", status="FAILED")
    with path.open("ab") as file:
        file.write(b"\x00\x00\n")
    with pytest.raises(InputError, match="is damaged before byte"):
        events(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "no event log"), ('{"format": "other 2"}', "other 2"), ("no json", "no event log"), (None, "cannot read")],
)
def test_other_formats_are_refused(path, text, message):
    if text is not None:
        path.write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        event_log.read_header(path)


def test_a_state_of_another_log_counts_for_nothing(path):
    first = header()
    EventLog(path, first)
    state = UploadState.load(path, first)
    assert (state.run, state.uri, state.run_id, state.sent) == (first["run"], first["uri"], None, 0)
    state.sent, state.run_id = 10**9, "abc"
    state.save(path)
    cut = UploadState.load(path, first)  # of a log whose end was lost
    assert (cut.sent, cut.run_id) == (path.stat().st_size, "abc")
    assert UploadState.load(path, header("local-2")).sent == 0
    UploadState.path(path).write_text("{")
    assert UploadState.load(path, first) == UploadState(first["run"], first["uri"])
