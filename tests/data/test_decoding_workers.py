"""The decoding processes: what they deliver, and where it lies."""

from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.data import decoding_workers as decoding
from dist_obdsd.data.decoding_workers import LENT, SLOTS, DecodedJob, DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.images import decode
from dist_obdsd.transfer import pin, unpin
from tests.data.pictures import encoded, noise
from tests.data.shards import SIZE, config_of

ROWS, CONFIG = 4, config_of("x", workers=1)


def jobs(n: int) -> Iterator[DecodeJob]:
    """Batches of the colours 0 to n - 1."""
    for i in range(n):
        data = encoded(Image.new("RGB", (SIZE, SIZE), (i, i, i)), "PNG")
        yield DecodeJob(i, [DecodeTask(row, data, None) for row in range(ROWS)])


def values(batch: DecodedJob) -> set[int]:
    return set(batch.images.unique().tolist())


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with closing(Decoder(jobs(40), ROWS, CONFIG, 1)) as made:
        yield made


def test_batches_lie_where_they_were_decoded_and_their_places_are_used_again(decoder: Decoder) -> None:
    places = []
    for i, batch in enumerate(decoder):
        assert batch.meta == i
        assert values(batch) == {i}
        places.append(batch.images.data_ptr())
        del batch
    assert len(places) == 40
    assert len(set(places)) <= SLOTS + LENT
    start = min(places)
    assert {(place - start) % (ROWS * 3 * SIZE * SIZE) for place in places} == {0}


def test_what_is_held_stays_as_it_is_and_stops_nobody(decoder: Decoder) -> None:
    parts = [next(decoder).images[1:2, :, ::2].permute(0, 2, 3, 1) for _ in range(LENT)]
    held = list(decoder)
    assert [part.unique().tolist() for part in parts] == [[i] for i in range(LENT)]
    assert [values(batch) for batch in held] == [{i} for i in range(LENT, 40)]


def test_damage_that_is_passed_over_is_not_printed_about(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(noise(1, "JPEG", (64, 64)))
    data[-200] ^= 0x55
    decode(bytes(data), 3)
    assert "Corrupt JPEG" in capfd.readouterr().err  # the control: this is what libjpeg says in any other process
    job = DecodeJob(0, [DecodeTask(0, bytes(data), None)])
    with closing(Decoder(iter([job]), ROWS, CONFIG, 1)) as decoder:
        assert not next(decoder).failures
    assert capfd.readouterr().err == ""


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Decoder(jobs(9), ROWS, CONFIG, 1, pinned=True)) as decoder:
        assert [values(batch) for batch in decoder] == [{i} for i in range(9)]
    assert len(caplog.messages) == (not torch.cuda.is_available())
    assert all("pinned (Found no NVIDIA driver" in message for message in caplog.messages)


def test_memory_is_pinned_in_place_and_unpinned_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's calls; on a machine with a GPU, the driver itself is called."""
    pinned: dict[int, int] = {}

    def taken(memory: np.ndarray) -> None:
        pinned[memory.ctypes.data] = memory.nbytes
        if torch.cuda.is_available():
            pin(memory)

    def given_back(memory: np.ndarray) -> None:
        del pinned[memory.ctypes.data]
        if torch.cuda.is_available():
            unpin(memory)

    monkeypatch.setattr(decoding, "pin", taken)
    monkeypatch.setattr(decoding, "unpin", given_back)
    with closing(Decoder(jobs(9), ROWS, CONFIG, 1, pinned=True)) as decoder:
        ((start, size),) = pinned.items()
        for batch in decoder:
            assert start <= batch.images.data_ptr() <= start + size - batch.images.nbytes
            assert batch.images.is_pinned() == torch.cuda.is_available()
            del batch
    assert not pinned
    decoder.close()
    Decoder(jobs(1), ROWS, CONFIG, 1).close()  # the control: nobody asked
    assert not pinned


def test_memory_stays_pinned_while_a_hung_rank_keeps_the_gpu_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostUnregister=given_back.append))
    for idle in (False, True):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda idle=idle: SimpleNamespace(query=lambda: idle))
        unpin(np.zeros(1))
        assert len(given_back) == idle
