import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_obdsd.data import shard_reader as reading
from dist_obdsd.data import stream
from dist_obdsd.data.images import decode
from dist_obdsd.data.manifest import key
from dist_obdsd.data.stream import EvalBatch, TrainBatch, TrainStream, evaluation_batches
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.errors import InputError, RunError
from tests.data import shards
from tests.data.shards import PER_CLASS, SHARDS, SIZE, Data, batches, config_of, joined, picture, same, streamed


def test_the_batches_are_those_of_the_plan(data: Data, alone: list[TrainBatch]) -> None:
    with streamed(data, config_of(data[0])) as source:
        plan = source.plan(1)
    second = alone[plan.steps :]
    assert [(batch.epoch, batch.step) for batch in second] == [(1, step) for step in range(plan.steps)]
    assert np.array_equal(np.stack([batch.ids_b for batch in second]), plan.ids_SB)
    assert np.array_equal(np.stack([batch.labels_B for batch in second]), plan.labels_SB)
    for batch in alone:
        assert batch.images_b.shape == (16, 3, SIZE, SIZE)
        assert [i // PER_CLASS for i in batch.ids_b.tolist()] == batch.labels_B.tolist()


def count_shards(monkeypatch: pytest.MonkeyPatch, function: str = "read_shard") -> list[str]:
    """The names of the shards that are read from now on."""
    read, original = [], getattr(reading, function)
    monkeypatch.setattr(reading, function, lambda *args: read.append(args[1].file) or original(*args))
    return read


def test_a_resumed_stream_reads_and_decodes_nothing_that_was_passed(data: Data, alone, monkeypatch) -> None:
    read, decoded = count_shards(monkeypatch), list[int]()
    original = stream.DecodeJob
    monkeypatch.setattr(stream, "DecodeJob", lambda meta, tasks: decoded.append(len(tasks)) or original(meta, tasks))
    steps, files = len(alone) // 2, []
    # The end of an epoch and the start of the next are the same place.
    for epoch, step in ((0, 0), (0, steps - 1), (0, steps), (1, 0), (2, 0)):
        read.clear()
        decoded.clear()
        rest = alone[epoch * steps + step :]
        assert same([batches(data, config_of(data[0]), 0, 1, epoch, step)], [rest])
        assert sum(decoded) == 16 * len(rest)
        files.append(len(read))
    assert files[0] == 2 * SHARDS  # each shard once per epoch
    assert SHARDS < files[1] < 2 * SHARDS  # only the windows still needed
    assert files[2:] == [SHARDS, SHARDS, 0]
    with pytest.raises(InputError, match="step 500 of epoch 0, which has"):
        batches(data, config_of(data[0]), 0, 1, 0, 500)


def test_a_rank_reads_only_its_lanes_and_holds_two_windows(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_shards(monkeypatch)
    with streamed(data, config_of(data[0], epochs=30), 1, 4) as source:
        plan = source.plan(0)
        mine = [data[1].splits["train"][i].file for window in plan.windows[1] for i in window]
        next(source)
        assert read[: len(mine)] == mine
        time.sleep(0.2)
        assert len(read) < 10  # of 60: reading runs ahead, but not away


def evaluated(data: Data, world: int = 1, workers: int = 0) -> list[EvalBatch]:
    """The test batches of all ranks."""
    config = config_of(data[0], workers=workers)
    return [batch for rank in range(world) for batch in evaluation_batches(data[1], "test", config, rank, world)]


def contents(batches: list[EvalBatch]) -> list[tuple[list[int], list[int], tuple[str, ...], bytes]]:
    """Ids, classes, roles and pixels of every batch, ordered by the ids."""
    return sorted((b.ids.tolist(), b.labels.tolist(), b.roles, b.images.numpy().tobytes()) for b in batches)


def test_evaluation_batches_do_not_depend_on_ranks(data: Data) -> None:
    reference = evaluated(data)
    everything = [i for batch in reference for i in batch.ids.tolist()]
    assert sorted(everything) == sorted(i for shard in data[1].splits["test"] for i in shard.ids)
    # 8 shards of 7 or 8 images with at most 5 in a batch: two batches of 4 each, not 5 and a rest.
    assert len(reference) == 2 * SHARDS
    for batch in reference:
        n = len(batch.ids)
        assert batch.images.shape == (4, 3, SIZE, SIZE)
        assert not batch.images[n:].any()
        assert all(image.any() for image in batch.images[:n])
        assert [i // PER_CLASS for i in batch.ids.tolist()] == batch.labels.tolist()
        assert batch.roles == tuple("query" if i % 2 else "gallery" for i in batch.ids.tolist())
    for world, workers in ((2, 2), (3, 0), (16, 0)):
        assert contents(evaluated(data, world, workers)) == contents(reference)
    # The shards' order in the manifest changes nothing.
    other = replace(data[1], splits={"test": data[1].splits["test"][::-1]})
    assert contents(evaluated((data[0], other))) == contents(reference)


def test_evaluation_of_chosen_classes_in_shared_batches(data: Data) -> None:
    config = config_of(data[0], batch_size=20)
    found = list(evaluation_batches(data[1], "train", config, 0, 1, [3, 4]))
    assert sorted(i for batch in found for i in batch.ids.tolist()) == list(range(3 * PER_CLASS, 5 * PER_CLASS))
    assert {label for batch in found for label in batch.labels.tolist()} == {3, 4}
    assert len(found) == 2  # of eight shards
    with pytest.raises(InputError, match="no split 'dev'"):
        evaluation_batches(data[1], "dev", config, 0, 1)


def test_a_missing_shard_is_refused_at_the_start(data: Data, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data[0], tmp_path / "shards"))
    (folder / "train-000006.tar").unlink()
    (folder / "test-000001.tar").unlink()
    with pytest.raises(InputError, match=r"1 of 8 shards are missing .*, the first is train-000006.tar \(No such file"):
        batches((folder, data[1]), config_of(folder))
    with pytest.raises(InputError, match="the first is test-000001.tar"):
        evaluation_batches(data[1], "test", config_of(folder), 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image(data: Data, alone, tmp_path: Path, caplog, workers: int) -> None:
    folder, third = Path(shutil.copytree(data[0], tmp_path / "shards")), data[1].splits["train"][2]
    bad = third.ids[1]
    shards.write_shard(folder, third, lambda i: picture(i)[: 99 if i == bad else None])
    how = rf"sample {key(bad)} of shard train-000002.tar cannot be decoded: .*`dist-obdsd verify {folder}`"
    with pytest.raises(RunError, match=how):
        batches((folder, data[1]), config_of(folder, workers=workers))
    with pytest.raises(RunError, match=rf"sample {key(bad)} .* an evaluation leaves nothing out"):
        list(evaluation_batches(data[1], "train", config_of(folder, max_bad_samples=9, workers=workers), 0, 1))
    config = config_of(folder, workers=workers, max_bad_samples=1)
    parts = [batches((folder, data[1]), config, rank, 2) for rank in range(2)]
    warnings = [record.getMessage() for record in caplog.records]
    assert 1 <= len(warnings) <= 2  # once on each rank that met it, although it came in both epochs
    assert f"sample {key(bad)} of shard train-000002.tar cannot be decoded and is replaced (1 of 1)" in warnings[0]
    shown = 0
    for (*_, images, ids, labels), (*_, whole, planned, classes) in zip(joined(parts), joined([alone]), strict=True):
        assert labels == classes
        assert all(images[row] == whole[row] for row, i in enumerate(planned) if i != bad)
        assert ids == [planned[row ^ 1] if i == bad else i for row, i in enumerate(planned)]  # the other of its group
        shown += planned.count(bad)
    assert shown == 2


def test_a_killed_decoding_process_is_an_error_not_a_hang(data: Data) -> None:
    with streamed(data, config_of(data[0], epochs=500, workers=1)) as source:
        next(source)
        os.kill(source._decoder._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match="decoding process ended with exit code -9"):
            list(islice(source, 100))


def test_decoding_processes_ignore_the_launchers_signals_and_end_with_the_stream(data: Data) -> None:
    before = set(threading.enumerate())
    with streamed(data, config_of(data[0], epochs=500, workers=2)) as source:
        next(source)
        processes = source._decoder._processes
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
        assert len(list(islice(source, 20))) == 20
    source.close()
    assert [process.is_alive() for process in processes] == [False, False]
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    with pytest.raises(RunError, match="closed"):
        next(source)


def test_a_program_that_forgets_to_close_still_ends(data: Data) -> None:
    """At the interpreter's exit the processes, which ignore SIGTERM, must not be waited for."""

    def forget() -> None:
        next(TrainStream(data[1], data[1].class_ids("train"), config_of(data[0], epochs=500, workers=2), 0, 1))

    process = multiprocessing.get_context("fork").Process(target=forget)
    process.start()
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize("sampling", ["epoch", "released"])
def test_pixels_belong_to_their_ids(data: Data, monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    """A shard is read to its end once a run; later, only the wanted images, which are still the right ones."""
    whole = count_shards(monkeypatch, "samples_of")
    config = config_of(data[0], epochs=3, sampling=sampling, augment="none")
    found = batches(data, config, 1, 2)
    files = {shard.file for shard in data[1].splits["train"]}
    assert sorted(whole) == sorted(files) if sampling == "released" else set(whole) <= files
    for batch in found[-3:]:
        for image, i in zip(batch.images_b, batch.ids_b.tolist(), strict=True):
            assert torch.equal(image, eval_transform(decode(picture(i), 3), config.data))
