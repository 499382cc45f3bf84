"""Waits for a GPU, and pinned memory; ``tests/gpu`` has the copies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_obdsd.data import decoding_workers as decoding
from dist_obdsd.data.decoding_workers import Decoder
from dist_obdsd.distributed.failures import is_timeout
from dist_obdsd.transfer import pin, unpin, wait_for
from tests.data.test_decoding_workers import CONFIG, ROWS, jobs, values


class Event:
    """Comes after so many questions."""

    def __init__(self, questions: float) -> None:
        self.left = questions

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_wait_for_a_gpu_that_waits_for_a_hung_rank_times_out() -> None:
    wait_for(Event(3), 60)
    with pytest.raises(RuntimeError) as caught:
        wait_for(Event(float("inf")), 0.01)
    assert is_timeout(caught.value)  # so the run's status names the ranks that hang


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    decoder = Decoder(jobs(9), ROWS, CONFIG, 1, pinned=True)
    try:
        assert [values(batch) for batch in decoder] == [{i} for i in range(9)]
    finally:
        decoder.close()
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
    decoder = Decoder(jobs(9), ROWS, CONFIG, 1, pinned=True)
    ((start, size),) = pinned.items()
    for batch in decoder:
        assert start <= batch.images.data_ptr() <= start + size - batch.images.nbytes
        assert batch.images.is_pinned() == torch.cuda.is_available()
        del batch
    decoder.close()
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
