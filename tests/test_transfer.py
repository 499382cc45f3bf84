"""Transfers on the CPU; copies to a GPU are tested where there is one."""

import numpy as np
import pytest
import torch

from dist_obdsd.data import decoding_workers as decoding
from dist_obdsd.data.decoding_workers import Decoder
from dist_obdsd.transfer import DeviceUploader, pin, unpin
from tests.data.test_decoding_workers import ROWS, config, jobs, values


def test_on_the_cpu_nothing_is_copied() -> None:
    images, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(5)
    upload = DeviceUploader(torch.device("cpu"))
    assert upload(images) is images
    assert upload(labels) is labels


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    decoder = Decoder(jobs(9), ROWS, config(1), 1, pinned=True)
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
    decoder = Decoder(jobs(9), ROWS, config(1), 1, pinned=True)
    ((start, size),) = pinned.items()
    for batch in decoder:
        assert start <= batch.images.data_ptr() <= start + size - batch.images.nbytes
        assert batch.images.is_pinned() == torch.cuda.is_available()
        del batch
    decoder.close()
    assert not pinned
    decoder.close()
    Decoder(jobs(1), ROWS, config(1), 1).close()  # the control: nobody asked
    assert not pinned
