import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_obdsd.errors import InputError
from dist_obdsd.tracking import event_log as spools
from dist_obdsd.tracking.event_log import Spool, State


def head(**config):
    return spools.new_head("http://127.0.0.1:1", {"name": "x", **config}, "m" * 64)


def rows(path, start=0):
    return [call for call, _ in spools.calls(path, start)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 40)), max_size=5))
def test_a_metric_stands_there_once_per_step_whatever_was_killed(tmp_path_factory, lives):
    """Each life does some steps, of which the next one repeats some, and is killed within its last line."""
    path = tmp_path_factory.mktemp("spool") / spools.NAME
    first, done = head(), 0
    expected = {}
    for number, (steps, again, torn) in enumerate(lives):
        spool = Spool(path, first)
        start = max(0, done - again)
        for step in range(start, start + steps):
            values = {"loss": step / 7, "seconds": number + step / 10}
            spool.metrics(values, step)
            expected.setdefault(step, values)
        done = max(done, start + steps)
        spool.close()
        if torn:
            with path.open("ab") as file:
                file.write((json.dumps({"n": 99, "kind": "metrics", "step": 1, "values": {}}) + "\n")[:torn].encode())
    if lives:
        Spool(path, first).append("end", status="FINISHED")
        *metrics, end = rows(path)
        assert {call["step"]: call["values"] for call in metrics} == expected
        assert len(metrics) == len(expected)
        assert [call["n"] for call in [*metrics, end]] == list(range(1, len(expected) + 2))
        assert spools.read_head(path) == first


def test_parameters_are_written_once(tmp_path):
    path = tmp_path / spools.NAME
    spool = Spool(path, head())
    spool.params({"lr": 0.1, "epochs": 3})
    Spool(path, {}).params({"lr": 0.2, "epochs": 3, "new": 1})
    assert [call["values"] for call in rows(path)] == [{"lr": "0.1", "epochs": "3"}, {"new": "1"}]


def test_batches_hold_neighbouring_metrics_and_end_where_the_next_begins(tmp_path):
    path = tmp_path / spools.NAME
    spool = Spool(path, head())
    spool.append("start", tags={})
    for step in range(25):
        spool.metrics({f"m{i}": i for i in range(90)}, step)
    spool.append("tags", values={"a": "b"})
    spool.metrics({"last": 1}, 25)
    made = list(spools.batches(path, 0))
    assert [len(calls) for calls, _ in made] == [1, 11, 11, 3, 1, 1]
    assert all(len({call["kind"] for call in calls}) == 1 for calls, _ in made)
    for i, (_, end) in enumerate(made):
        assert list(spools.batches(path, end)) == made[i + 1 :]


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    path = tmp_path / spools.NAME
    Spool(path, head()).append("end", status="FAILED")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert rows(path) == []
    path.write_bytes(whole)
    assert [call["status"] for call in rows(path)] == ["FAILED"]


def test_damage_and_other_formats_are_told(tmp_path):
    path = tmp_path / spools.NAME
    spool = Spool(path, head())
    spool.append("end", status="FAILED")
    with path.open("ab") as file:
        file.write(b"\x00\x00\n")
    with pytest.raises(InputError, match="is damaged before byte"):
        rows(path)
    for text, message in (("{}", "has format None"), ('{"format": "other 2"}', "other 2"), ("no json", "no spool")):
        path.write_text(text + "\n")
        with pytest.raises(InputError, match=message):
            spools.read_head(path)
    with pytest.raises(InputError, match="cannot read"):
        spools.read_head(tmp_path / "none")


def test_a_state_of_another_spool_is_refused_and_one_that_is_ahead_is_cut(tmp_path):
    path, first = tmp_path / spools.NAME, head()
    Spool(path, first)
    state = State.load(path, first)
    assert (state.run, state.uri, state.run_id, state.sent) == (first["run"], first["uri"], None, 0)
    state.sent, state.run_id = 10**9, "abc"
    state.save(path)
    assert State.load(path, first).sent == path.stat().st_size
    assert State.load(path, first).run_id == "abc"
    with pytest.raises(InputError, match="is of run"):
        State.load(path, head())
    State.path(path).write_text("{")
    with pytest.raises(InputError, match="not readable"):
        State.load(path, first)


def test_one_at_a_time_may_send(tmp_path):
    path = tmp_path / spools.NAME
    Spool(path, head())
    with spools.sending(path), pytest.raises(InputError, match="a live run or a replay"), spools.sending(path):
        pass
    with spools.sending(path):
        pass
