"""The stream, the evaluation, ``verify`` and ``doctor`` on shards that are not here."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_obdsd.cli import doctor
from dist_obdsd.cli.main import main
from dist_obdsd.data import remote
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import check_files
from dist_obdsd.data.stream import evaluation_batches
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.errors import InputError, RunError
from tests.data.server import Server, serving
from tests.data.shards import SHARDS, Data, batches, config_of, same

HERE = Runtime(Launch("single"), torch.device("cpu"))


@pytest.fixture
def server(data: Data) -> Iterator[Server]:
    with serving(data[0]) as running:
        yield running


def test_a_cache_gives_the_same_batches_and_reads_once(data: Data, alone, server: Server, tmp_path: Path) -> None:
    train, test = ([shard.file for shard in data[1].splits[split]] for split in ("train", "test"))
    for file in train:
        server.faults[file] = [30, 503, 80]
    config = config_of(server.url, cache=str(tmp_path / "cache"), workers=1)
    assert same([batches(data, config, rank, 2) for rank in range(2)], [alone])
    assert [server.count(file) for file in train] == [4] * SHARDS  # in two epochs
    # Training and evaluation share it, and so do later runs.
    server.requests.clear()
    for _ in range(2):
        list(evaluation_batches(data[1], "train", config, 0, 1))
        list(evaluation_batches(data[1], "test", config, 0, 1))
    assert sorted(name for name, _ in server.requests) == sorted(test)
    # A small one still serves.
    largest = max(shard.bytes for shard in data[1].splits["train"])
    small = config_of(server.url, cache=str(tmp_path / "small"), cache_gib=2.5 * largest / 2**30)
    assert same([batches(data, small)], [alone])
    assert 1 <= len(list((tmp_path / "small").glob("*.tar"))) <= 3


@pytest.mark.parametrize("cached", [True, False])
def test_shards_behind_a_command(data: Data, alone: list, tmp_path: Path, cached: bool) -> None:
    cache = str(tmp_path / "cache") if cached else None
    assert same([batches(data, config_of(f"pipe:cat {data[0]}/{{file}}", cache=cache))], [alone])
    with pytest.raises(RunError, match=r"cannot download pipe:false .*train-00000\d.tar .*: its command ended with"):
        batches(data, config_of("pipe:false shards"))


def test_missing_or_cut_shards_are_found_before_they_are_read(data: Data, server: Server) -> None:
    shards = tuple(data[1].shards())
    a, b, c = (shard.file for shard in shards[9:12])

    def check_refused(root: str, fact: str) -> None:
        with pytest.raises(InputError, match=fact):
            check_files(root, shards, sizes=True)

    check_files(server.url, shards, sizes=True)
    assert sorted(server.requests) == sorted((f"{shard.file}?", 0) for shard in shards)  # one byte of each
    server.faults[b], server.faults[c] = [b"cut"], [404]
    check_refused(server.url, rf"2 of 16 .* at {server.url}, the first is {b} \(it has 3 bytes")
    server.faults[a] = [403]
    check_refused(server.url, rf"1 of 16 .*, the first is {a} \(the server answers 403")
    server.ranges = False  # the whole file is offered, and its size with it
    server.faults[a] = [b"cut"]
    check_refused(server.url, "it has 3 bytes")
    # A folder by fsspec, and a command, of which the first shard is begun.
    check_files(f"file://{data[0]}", shards, sizes=True)
    check_refused(f"file://{data[0]}/nothing", "16 of 16 shards are missing or damaged at file://")
    check_files(f"pipe:cat {data[0]}/{{file}}", shards, sizes=True)
    check_refused("pipe:false", "train-000000.tar .its command ended with exit code 1")


def test_a_server_that_is_busy_or_slow_refuses_nothing(data: Data, server: Server, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    shards, go_on = data[1].splits["test"], threading.Event()
    server.faults[shards[0].file] = [503]
    check_files(server.url, shards, sizes=True)
    assert "1 of 8 shards could not be checked" in caplog.text
    monkeypatch.setattr(remote, "ASKING", 0.1)
    monkeypatch.setattr(remote, "_size_of", lambda url: go_on.wait(60))
    check_files(server.url, shards, sizes=True)
    go_on.set()
    assert "8 of 8 shards could not be checked" in caplog.text


def test_verify_reads_a_url(data: Data, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(server.url, workers=2) == []
    server.faults["train-000003.tar"] = [404, 404]
    (problem,) = verify(server.url)
    assert problem.startswith(f"train-000003.tar: cannot download {server.url}/train-000003.tar ")
    assert "404 Not Found" in problem
    assert main(["verify", server.url, "--workers", "1"]) == 2
    assert f"{server.url} has 1 problems" in capsys.readouterr().err


def test_doctor_reads_a_url(data: Data, server: Server, tmp_path: Path) -> None:
    config = config_of(server.url, cache=str(tmp_path / "cache"))
    assert any("16 remote shards of" in line and "; 0 are in" in line for line in doctor.where_it_runs(HERE, config))
    list(evaluation_batches(data[1], "test", config, 0, 1))
    assert any(f"; {SHARDS} are in" in line for line in doctor.where_it_runs(HERE, config))
    server.faults["train-000000.tar"] = [403]
    with pytest.raises(InputError, match="train-000000.tar .the server answers 403"):
        doctor.where_it_runs(HERE, config)
