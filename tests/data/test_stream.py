import dataclasses
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
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
from tests.data.packing.readers.layouts import write_archive
from tests.data.shards import (
    CLASSES,
    PER_CLASS,
    SHARDS,
    SIZE,
    Data,
    batches,
    config_of,
    joined,
    picture,
    same,
    streamed,
)


def test_the_batches_are_those_of_the_plan(data: Data, alone: list[TrainBatch]) -> None:
    with streamed(data, config_of(data[0])) as source:
        plan = source.plan(1)
    second = [batch for batch in alone if batch.epoch == 1]
    assert [batch.step for batch in second] == list(range(plan.steps))
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


def test_a_resumed_stream_reads_and_decodes_nothing_that_was_passed(
    data: Data, alone: list[TrainBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, decoded = count_shards(monkeypatch), list[int]()
    original = stream.DecodeJob
    monkeypatch.setattr(stream, "DecodeJob", lambda meta, tasks: decoded.append(len(tasks)) or original(meta, tasks))
    steps = len(alone) // 2
    files = []
    for position in (0, steps - 1, steps, len(alone)):
        read.clear()
        decoded.clear()
        rest = batches(data, config_of(data[0]), 0, 1, *divmod(position, steps))
        assert same([rest], [alone[position:]])
        assert sum(decoded) == 16 * (len(alone) - position)
        files.append(len(read))
    assert files[0] == 2 * SHARDS  # each shard once per epoch
    assert files[1] < 2 * SHARDS  # only the windows still needed
    assert files[3] == 0
    # The end of an epoch and the start of the next are the same place.
    assert same([batches(data, config_of(data[0]), 0, 1, 0, steps)], [alone[steps:]])
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


def evaluated(data: Data, world: int, **settings: int) -> list[list[EvalBatch]]:
    config = config_of(data[0], **settings)
    return [list(evaluation_batches(data[1], "test", config, rank, world)) for rank in range(world)]


def test_evaluation_batches_do_not_depend_on_ranks(data: Data) -> None:
    reference = {tuple(batch.ids.tolist()): batch for batch in evaluated(data, 1)[0]}
    everything = [i for ids in reference for i in ids]
    assert sorted(everything) == sorted(i for shard in data[1].splits["test"] for i in shard.ids)
    for world, workers in ((2, 2), (3, 0), (16, 0)):
        parts = evaluated(data, world, workers=workers)
        assert Counter(tuple(b.ids.tolist()) for part in parts for b in part) == Counter(list(reference))
        for batch in (b for part in parts for b in part):
            same = reference[tuple(batch.ids.tolist())]
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.labels, same.labels)
            assert batch.roles == same.roles
    # 8 shards of 7 or 8 images with at most 5 in a batch: two batches of 4 each, not 5 and a rest.
    assert len(reference) == 2 * SHARDS
    for batch in reference.values():
        n = len(batch.ids)
        assert batch.images.shape == (4, 3, SIZE, SIZE)
        assert not batch.images[n:].any()
        assert all(image.any() for image in batch.images[:n])
        assert [i // PER_CLASS for i in batch.ids.tolist()] == batch.labels.tolist()
        assert batch.roles == tuple("query" if i % 2 else "gallery" for i in batch.ids.tolist())
    # The shards' order in the manifest changes nothing.
    splits = {"test": data[1].splits["test"][::-1]}
    for batch in evaluated((data[0], dataclasses.replace(data[1], splits=splits)), 1)[0]:
        assert torch.equal(batch.images, reference[tuple(batch.ids.tolist())].images)


def test_evaluation_of_chosen_classes_in_shared_batches(data: Data) -> None:
    config = config_of(data[0], batch_size=20)
    found = list(evaluation_batches(data[1], "train", config, 0, 1, [3, 4]))
    assert sorted(i for batch in found for i in batch.ids.tolist()) == list(range(3 * PER_CLASS, 5 * PER_CLASS))
    assert {label for batch in found for label in batch.labels.tolist()} == {3, 4}
    assert len(found) == 2  # of eight shards
    with pytest.raises(InputError, match="no split 'dev'"):
        evaluation_batches(data[1], "dev", config, 0, 1)


def damaged(data: Data, folder: Path, shard: int, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the shards in which ``change`` was applied to the members (name -> bytes) of one training shard."""
    for path in data[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = data[1].splits["train"][shard].file
    with tarfile.open(data[0] / name) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    change(members)
    write_archive(folder / name, members)
    return folder


def test_a_wrong_shard_stops_the_run(data: Data, tmp_path: Path) -> None:
    """With a class that is another one; packing/test_verify.py has what else may be wrong."""
    folder = damaged(data, tmp_path, 3, lambda m: m.update({next(n for n in m if n.endswith("cls")): b"77"}))
    for read in (
        lambda: batches((folder, data[1]), config_of(folder, workers=2)),
        lambda: list(evaluation_batches(data[1], "train", config_of(folder), 0, 1)),
    ):
        with pytest.raises(RunError, match="class b'77' where") as caught:
            read()
        assert "train-000003.tar" in str(caught.value)
        assert f"dist-obdsd verify {folder}" in str(caught.value)


def test_a_missing_shard_is_refused_at_the_start(data: Data, tmp_path: Path) -> None:
    folder = damaged(data, tmp_path, 0, lambda members: None)
    (folder / "train-000006.tar").unlink()
    (folder / "test-000001.tar").unlink()
    with pytest.raises(InputError, match=r"1 of 8 shards are missing .*, the first is train-000006.tar \(No such file"):
        TrainStream(data[1], list(range(CLASSES)), config_of(folder), 0, 1)
    with pytest.raises(InputError, match="the first is test-000001.tar"):
        evaluation_batches(data[1], "test", config_of(folder), 0, 1)


def broken_image(members: dict[str, bytes]) -> None:
    name = [name for name in members if name.endswith(("jpg", "png"))][1]
    members[name] = members[name][: len(members[name]) // 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image(
    data: Data, tmp_path: Path, alone: list[TrainBatch], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged(data, tmp_path, 2, broken_image)
    bad = data[1].splits["train"][2].ids[1]
    with pytest.raises(RunError, match=rf"sample {key(bad)} of shard train-000002.tar cannot be decoded: .*"):
        batches((folder, data[1]), config_of(folder, workers=workers))
    with pytest.raises(RunError, match=rf"sample {key(bad)} .* an evaluation leaves nothing out"):
        list(evaluation_batches(data[1], "train", config_of(folder, max_bad_samples=9, workers=workers), 0, 1))

    config = config_of(folder, workers=workers, max_bad_samples=1)
    parts = [batches((folder, data[1]), config, rank, 2) for rank in range(2)]
    warnings = [record.getMessage() for record in caplog.records]
    assert 1 <= len(warnings) <= 2  # once on each rank that met it, although it came in both epochs
    assert f"sample {key(bad)} of shard train-000002.tar cannot be decoded and is replaced (1 of 1)" in warnings[0]
    shown = 0
    for found, wanted in zip(joined(parts), joined([alone]), strict=True):
        assert found[4] == wanted[4]
        for row, (i, planned) in enumerate(zip(found[3], wanted[3], strict=True)):
            if planned == bad:
                assert i == wanted[3][row ^ 1]  # the other image of its group
                assert i // PER_CLASS == found[4][row]
                shown += 1
            else:
                assert i == planned
                assert torch.equal(found[2][row], wanted[2][row])
    assert shown == 2


def test_a_killed_decoding_process_is_an_error_not_a_hang(data: Data) -> None:
    with streamed(data, config_of(data[0], epochs=500, workers=1)) as source:
        next(source)
        os.kill(source._decoder._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match="decoding process ended with exit code -9"):
            list(islice(source, 100))


def test_decoding_processes_ignore_the_launchers_signals_and_end_with_the_stream(data: Data) -> None:
    before = threading.active_count()
    with streamed(data, config_of(data[0], epochs=500, workers=2)) as source:
        next(source)
        processes = source._decoder._processes
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
        assert len(list(islice(source, 20))) == 20
    source.close()
    assert [process.is_alive() for process in processes] == [False, False]
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    with pytest.raises(RunError, match="closed"):
        next(source)


def test_a_program_that_forgets_to_close_still_ends(data: Data) -> None:
    """At the interpreter's exit the processes, which ignore SIGTERM, must not be waited for."""

    def forget() -> None:
        next(TrainStream(data[1], list(range(CLASSES)), config_of(data[0], epochs=500, workers=2), 0, 1))

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
