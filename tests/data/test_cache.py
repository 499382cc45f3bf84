import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dist_obdsd.data import cache as caching
from dist_obdsd.data import remote
from dist_obdsd.data.cache import Cache
from dist_obdsd.data.manifest import Shard
from dist_obdsd.errors import InputError, RunError
from tests.data.server import Server

SIZE = 300_000


def shards_of(server: Server, number: int) -> list[Shard]:
    shards = []
    for n in range(number):
        data = bytes([n]) * SIZE
        (server.folder / f"{n}.tar").write_bytes(data)
        shards.append(Shard(f"{n}.tar", SIZE, hashlib.sha256(data).hexdigest(), (), (), ()))
    return shards


def read(cache: Cache, server: Server, shard: Shard) -> bytes:
    with cache.open(shard, f"{server.url}/{shard.file}") as file:
        return file.read()


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix != ".lock")


def filling(server: Server, shards: list[Shard], folder: Path) -> multiprocessing.process.BaseProcess:
    """A process that reads shards through a cache."""

    def fill() -> None:
        for shard in shards:
            assert read(Cache(folder), server, shard) == bytes([int(shard.file[0])]) * SIZE

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    return process


def test_what_is_not_the_manifest_s_is_not_kept(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    (shard,) = shards_of(server, 1)
    server.faults["0.tar"] = [b"x" * SIZE] * remote.ATTEMPTS
    with pytest.raises(RunError, match=r"0.tar .*: it has SHA-256"):
        read(cache, server, shard)
    assert names(cache) == []
    assert read(cache, server, shard) == bytes(SIZE)
    cache.path(shard).write_bytes(b"shorter")  # by somebody else
    assert read(cache, server, shard) == bytes(SIZE)
    for sha256 in ("", "../../escape", "A" * 64):
        with pytest.raises(InputError, match="as SHA-256 of shard 0.tar, which the cache needs"):
            read(cache, server, Shard("0.tar", SIZE, sha256, (), (), ()))


def test_the_oldest_used_go_first(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=3 * SIZE)
    shards = shards_of(server, 5)
    for n, shard in enumerate(shards[:3]):
        read(cache, server, shard)
        os.utime(cache.path(shard), (n, n))
    read(cache, server, shards[0])  # is now the newest
    with cache.open(shards[1], f"{server.url}/1.tar") as held:
        os.utime(cache.path(shards[1]), (1, 1))
        read(cache, server, shards[3])
        read(cache, server, shards[4])
        assert [cache.path(shard).exists() for shard in shards] == [True, False, False, True, True]
        assert held.read() == bytes([1]) * SIZE  # evicted while it was open
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 3 * SIZE
    with pytest.raises(InputError, match=r"shard 0.tar has 0.000279 GiB but data.cache_gib allows 0.000279 for all"):
        read(Cache(tmp_path / "other", limit=SIZE - 1), server, shards[0])


@pytest.mark.parametrize("locks", [True, False])
def test_three_processes_fill_one_cache(server: Server, tmp_path: Path, monkeypatch, locks: bool) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", none)
    shards = shards_of(server, 6)
    for shard in shards:
        server.faults[shard.file] = [lambda name: time.sleep(0.05), 60]
    cache = Cache(tmp_path / "cache")
    orders = (shards, shards[::-1], shards[2:] + shards[:2])
    processes = [filling(server, order, cache.folder) for order in orders]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert names(cache) == sorted(f"{shard.sha256}.tar" for shard in shards)
    for shard in shards:
        assert hashlib.sha256(cache.path(shard).read_bytes()).hexdigest() == shard.sha256
    if locks:
        assert [server.count(shard.file) for shard in shards] == [1] * 6


def test_a_process_killed_in_a_download_is_in_nobody_s_way(server: Server, tmp_path: Path) -> None:
    (shard,) = shards_of(server, 1)
    half, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        half.set()
        go_on.wait(30)

    server.faults["0.tar"] = [wait]
    folder = tmp_path / "cache"
    process = filling(server, [shard], folder)
    try:
        assert half.wait(30)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join(10)
        assert read(Cache(folder), server, shard) == bytes(SIZE)
        (left,) = folder.glob("*.part")  # another process may write there
        os.utime(left, (time.time() - caching.ABANDONED - 60,) * 2)
        assert names(Cache(folder)) == [f"{shard.sha256}.tar"]
    finally:
        go_on.set()
        process.kill()
        process.join()


def test_a_really_full_disk(server: Server, small_disk: Path) -> None:
    *three, last = shards_of(server, 4)
    cache = Cache(small_disk / "cache")
    for shard in three:
        read(cache, server, shard)
    with pytest.raises(RunError, match="3.tar to .*: No space left on device; free some space, set or lower data.cach"):
        read(cache, server, last)
    assert len(names(cache)) == 3
    assert read(Cache(cache.folder, 3 * SIZE), server, last) == bytes([3]) * SIZE


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot use data.cache=.*file: File exists; choose another folder"):
        Cache(tmp_path / "file")
