import dataclasses
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import shard_reader as reading
from dist_obdsd.data import stream
from dist_obdsd.data.images import decode
from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.stream import EvalBatch, TrainBatch, TrainStream, evaluation_batches
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.errors import InputError, RunError

CLASSES, PER_CLASS, SHARDS, SIZE = 12, 12, 8, 8


def picture(sample_id: int, kind: str = "PNG") -> bytes:
    """Noise that is different for every id."""
    pixels = np.random.default_rng(sample_id).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(
    folder: Path, split: str, role: Callable[[int], str], classes: range, draw: np.random.Generator
) -> list[Shard]:
    """Write a split; each class's images in pairs over the shards."""
    pairs = [(label, label * PER_CLASS + i) for label in classes for i in range(0, PER_CLASS, 2)]
    order = draw.permutation(len(pairs))
    shards = []
    for n in range(SHARDS):
        samples = [(pairs[i][0], pairs[i][1] + j) for i in order[n::SHARDS] for j in (0, 1)]
        path = folder / f"{split}-{n:06d}.tar"
        with TarWriter(str(path)) as tar:
            for label, i in samples:
                member = {"jpg": picture(i, "JPEG")} if i % 3 == 0 else {"png": picture(i)}
                tar.write({"__key__": key(i), **member, "cls": str(label).encode(), "json": b"{}"})
        labels, ids = zip(*samples, strict=True)
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append(Shard(path.name, len(content), sha256, ids, labels, tuple(map(role, ids))))
    return shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    splits = {
        "train": tuple(write(folder, "train", lambda i: "train", range(CLASSES), draw)),
        "test": tuple(write(folder, "test", lambda i: "query" if i % 2 else "gallery", range(20, 25), draw)),
    }
    return folder, Manifest({}, 0, 2, tuple(map(str, range(25))), splits)


def config_of(folder: Path, epochs: int = 2, workers: int = 0, batch_size: int = 5, **changes: object) -> Config:
    settings = {"shards": str(folder), "image_size": SIZE, "lanes": 4, "window": 1, "workers": workers} | changes
    raw = {
        "name": "test",
        "epochs": epochs,
        "data": settings,
        "batch": {"global_size": 16},
        "evaluation": {"batch_size": batch_size},
    }
    return parse_config(raw, "test")


def batches(
    data: tuple[Path, Manifest], config: Config, rank: int = 0, world: int = 1, start: tuple[int, int] = (0, 0)
) -> list[TrainBatch]:
    source = TrainStream(data[1], list(range(CLASSES)), config, rank, world, *start)
    try:
        return list(source)
    finally:
        source.close()


def joined(parts: list[list[TrainBatch]]) -> Iterator[tuple[int, int, torch.Tensor, list[int], list[int]]]:
    """The global batches, from those of every rank."""
    for step in zip(*parts, strict=True):
        for other in step[1:]:
            assert (other.epoch, other.step) == (step[0].epoch, step[0].step)
            assert torch.equal(other.labels_B, step[0].labels_B)
        images_B = torch.cat([batch.images_b for batch in step])
        ids = torch.cat([batch.ids_b for batch in step]).tolist()
        yield step[0].epoch, step[0].step, images_B, ids, step[0].labels_B.tolist()


def assert_same(a: list[list[TrainBatch]], b: list[list[TrainBatch]]) -> None:
    for one, other in zip(joined(a), joined(b), strict=True):
        assert one[:2] == other[:2]
        assert one[3:] == other[3:]
        assert torch.equal(one[2], other[2])


@pytest.fixture(scope="module")
def alone(data: tuple[Path, Manifest]) -> list[TrainBatch]:
    """What one rank without decoding processes gives: the reference."""
    return batches(data, config_of(data[0]))


def test_the_batches_are_those_of_the_plan(data: tuple[Path, Manifest], alone: list[TrainBatch]) -> None:
    plan = TrainStream(data[1], list(range(CLASSES)), config_of(data[0]), 0, 1).plan(1)
    second = [batch for batch in alone if batch.epoch == 1]
    assert [batch.step for batch in second] == list(range(plan.steps))
    assert np.array_equal(np.stack([batch.ids_b for batch in second]), plan.ids_SB)
    assert np.array_equal(np.stack([batch.labels_B for batch in second]), plan.labels_SB)
    for batch in alone:
        assert batch.images_b.shape == (16, 3, SIZE, SIZE)
        assert batch.images_b.dtype == torch.uint8
        assert [i // PER_CLASS for i in batch.ids_b.tolist()] == batch.labels_B.tolist()
        assert batch.replaced == []


def test_pixels_belong_to_their_ids(data: tuple[Path, Manifest]) -> None:
    config = config_of(data[0], epochs=2, workers=2, augment="none")
    for batch in batches(data, config)[:3]:
        for image, i in zip(batch.images_b, batch.ids_b.tolist(), strict=True):
            kind = "JPEG" if i % 3 == 0 else "PNG"
            assert torch.equal(image, eval_transform(decode(picture(i, kind), 3), config.data))


def test_every_epoch_and_seed_gives_other_pixels(data: tuple[Path, Manifest], alone: list[TrainBatch]) -> None:
    other = batches(data, config_of(data[0]).model_copy(update={"seed": 1}))
    of_image = [
        {i: image for batch in part for i, image in zip(batch.ids_b.tolist(), batch.images_b, strict=True)}
        for part in (alone[: len(alone) // 2], alone[len(alone) // 2 :], other)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = of_image[a].keys() & of_image[b].keys()
        assert sum(torch.equal(of_image[a][i], of_image[b][i]) for i in same) < 3 < len(same)


def test_a_resumed_stream_reads_and_decodes_nothing_that_was_passed(
    data: tuple[Path, Manifest], alone: list[TrainBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    decoded: list[int] = []
    original_read, original_decode = reading.read_shard, stream.DecodeJob

    def counted(root: str, shard: Shard, *args: object) -> Iterator[tuple[int, bytes]]:
        read.append(shard.file)
        return original_read(root, shard, *args)

    monkeypatch.setattr(reading, "read_shard", counted)
    monkeypatch.setattr(
        stream, "DecodeJob", lambda meta, tasks: decoded.append(len(tasks)) or original_decode(meta, tasks)
    )
    steps = len(alone) // 2
    files = []
    for position in (0, steps - 1, steps, len(alone)):
        read.clear()
        decoded.clear()
        rest = batches(data, config_of(data[0]), start=divmod(position, steps))
        assert_same([rest], [alone[position:]])
        assert sum(decoded) == 16 * (len(alone) - position)
        files.append(len(read))
    assert files[0] == 2 * SHARDS  # each shard once per epoch
    assert files[1] < 2 * SHARDS  # only the windows still needed
    assert files[3] == 0
    # The end of an epoch and the start of the next are the same place.
    assert_same([batches(data, config_of(data[0]), start=(0, steps))], [alone[steps:]])
    with pytest.raises(InputError, match="step 500 of epoch 0, which has"):
        batches(data, config_of(data[0]), start=(0, 500))


def test_a_rank_reads_only_its_lanes_and_holds_two_windows(
    data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = reading.read_shard
    monkeypatch.setattr(
        reading, "read_shard", lambda root, shard, *args: read.append(shard.file) or original(root, shard, *args)
    )
    source = TrainStream(data[1], list(range(CLASSES)), config_of(data[0], epochs=30), 1, 4)
    try:
        plan = source.plan(0)
        mine = [data[1].splits["train"][i].file for window in plan.windows[1] for i in window]
        next(source)
        assert read[: len(mine)] == mine
        deadline = time.monotonic() + 5
        while len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(read) < 10  # of 60: reading runs ahead, but not away
    finally:
        source.close()


def evaluated(
    data: tuple[Path, Manifest], world: int, workers: int = 0, classes: list[int] | None = None, split: str = "test"
) -> list[list[EvalBatch]]:
    config = config_of(data[0], workers=workers)
    return [list(evaluation_batches(data[1], split, config, rank, world, classes)) for rank in range(world)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_do_not_depend_on_ranks(data: tuple[Path, Manifest], workers: int) -> None:
    reference = {tuple(batch.ids.tolist()): batch for batch in evaluated(data, 1)[0]}
    everything = [i for ids in reference for i in ids]
    assert sorted(everything) == sorted(i for shard in data[1].splits["test"] for i in shard.ids)
    for world in (2, 3, 16):
        parts = evaluated(data, world, workers)
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


def test_small_shards_share_an_evaluation_batch(data: tuple[Path, Manifest]) -> None:
    config = config_of(data[0], batch_size=20)
    batches = list(evaluation_batches(data[1], "test", config, 0, 1))
    total = data[1].images("test")
    assert sum(len(batch.ids) for batch in batches) == total
    assert max(len(batch.ids) for batch in batches) == batches[0].images.shape[0] <= 20
    assert len(batches) <= -(-total // 10)


def test_evaluation_of_chosen_classes(data: tuple[Path, Manifest]) -> None:
    (part,) = evaluated(data, 1, classes=[3, 4], split="train")
    ids = [i for batch in part for i in batch.ids.tolist()]
    assert sorted(ids) == list(range(3 * PER_CLASS, 5 * PER_CLASS))
    assert {label for batch in part for label in batch.labels.tolist()} == {3, 4}
    with pytest.raises(InputError, match="no split 'dev'"):
        evaluated(data, 1, split="dev")


def damaged(data: tuple[Path, Manifest], folder: Path, shard: int, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the shards in which ``change`` was applied to the members (name -> bytes) of one training shard."""
    for path in data[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = data[1].splits["train"][shard].file
    with tarfile.open(data[0] / name) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(folder / name, "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_shard_stops_the_run(data: tuple[Path, Manifest], tmp_path: Path, workers: int) -> None:
    """With a class that is another one; packing/test_verify.py has what else may be wrong."""
    folder = damaged(data, tmp_path, 3, lambda m: m.update({next(n for n in m if n.endswith("cls")): b"77"}))
    for read in (
        lambda: batches((folder, data[1]), config_of(folder, workers=workers)),
        lambda: list(evaluation_batches(data[1], "train", config_of(folder, workers=workers), 0, 1)),
    ):
        with pytest.raises(RunError, match="class b'77' where") as caught:
            read()
        assert "train-000003.tar" in str(caught.value)
        assert f"dist-obdsd verify {folder}" in str(caught.value)


def test_a_missing_shard_is_refused_at_the_start(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder = damaged(data, tmp_path, 0, lambda members: None)
    (folder / "train-000006.tar").unlink()
    (folder / "test-000001.tar").unlink()
    with pytest.raises(InputError, match=r"1 of 8 shards are missing in .*, the first is train-000006.tar"):
        TrainStream(data[1], list(range(CLASSES)), config_of(folder), 0, 1)
    with pytest.raises(InputError, match="the first is test-000001.tar"):
        evaluation_batches(data[1], "test", config_of(folder), 0, 1)


def broken_image(members: dict[str, bytes]) -> None:
    name = [name for name in members if name.endswith(("jpg", "png"))][1]
    members[name] = members[name][: len(members[name]) // 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image(
    data: tuple[Path, Manifest],
    tmp_path: Path,
    alone: list[TrainBatch],
    workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = damaged(data, tmp_path, 2, broken_image)
    bad = data[1].splits["train"][2].ids[1]
    with pytest.raises(RunError, match=rf"sample {key(bad)} of shard train-000002.tar cannot be decoded: .*"):
        batches((folder, data[1]), config_of(folder, workers=workers))
    with pytest.raises(RunError, match=rf"sample {key(bad)} .* an evaluation leaves nothing out"):
        list(evaluation_batches(data[1], "train", config_of(folder, max_bad_samples=9, workers=workers), 0, 1))

    config = config_of(folder, workers=workers, max_bad_samples=1)
    parts = []
    for rank in range(2):
        source = TrainStream(data[1], list(range(CLASSES)), config, rank, 2)
        parts.append(list(source))
        source.close()
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
    assert [name for part in parts for batch in part for name in batch.replaced] == [key(bad)] * 2


def test_a_killed_decoding_process_is_an_error_not_a_hang(data: tuple[Path, Manifest]) -> None:
    source = TrainStream(data[1], list(range(CLASSES)), config_of(data[0], epochs=500, workers=1), 0, 1)
    try:
        next(source)
        os.kill(source._decoder._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match="decoding process ended with exit code -9"):
            list(islice(source, 100))
    finally:
        source.close()


def test_decoding_processes_ignore_the_launchers_signals_and_end_with_the_stream(data: tuple[Path, Manifest]) -> None:
    before = threading.active_count()
    source = TrainStream(data[1], list(range(CLASSES)), config_of(data[0], epochs=500, workers=2), 0, 1)
    next(source)
    processes = source._decoder._processes
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    assert len(list(islice(source, 20))) == 20
    source.close()
    source.close()
    assert [process.is_alive() for process in processes] == [False, False]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    with pytest.raises(RunError, match="closed"):
        next(source)


def test_a_program_that_forgets_to_close_still_ends(data: tuple[Path, Manifest]) -> None:
    """At the interpreter's exit the processes, which ignore SIGTERM, must not be waited for."""
    (data[0] / "manifest.json").write_text(to_json(data[1]))
    program = (
        "from dist_obdsd.data.manifest import load\n"
        "from dist_obdsd.data.stream import TrainStream\n"
        "from tests.data.test_stream import CLASSES, config_of\n"
        f"source = TrainStream(load({str(data[0])!r}), list(range(CLASSES)), "
        f"config_of({str(data[0])!r}, epochs=500, workers=2), 0, 1)\n"
        "print(next(source).step, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_reading_may_run_many_short_epochs_ahead(data: tuple[Path, Manifest]) -> None:
    """With a step or two an epoch, the reader is soon further ahead than the plans that are kept."""
    folder, manifest = data
    config = config_of(folder, epochs=30)
    two_steps = TrainStream(manifest, [0, 1, 2], config, 0, 1)
    try:
        time.sleep(0.5)
        for epoch in range(config.epochs):
            for step in range(two_steps.plan(epoch).steps):
                batch = next(two_steps)
                assert (batch.epoch, batch.step) == (epoch, step)
    finally:
        two_steps.close()
