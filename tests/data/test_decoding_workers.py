"""The decoding processes: what they deliver, and where it lies."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.decoding_workers import LENT, SLOTS, DecodedJob, DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.images import decode
from tests.data.pictures import encoded

ROWS, SIDE = 4, 8


def config(workers: int) -> Config:
    data = {"shards": "x", "image_size": SIDE, "workers": workers}
    return parse_config({"name": "x", "epochs": 2, "data": data}, "test")


def picture(i: int, kind: str = "PNG") -> bytes:
    return encoded(Image.fromarray(np.full((SIDE, SIDE, 3), i, dtype=np.uint8)), kind)


def jobs(n: int, rows: int = ROWS) -> Iterator[DecodeJob]:
    for i in range(n):
        yield DecodeJob(i, [DecodeTask(row, picture(i), None) for row in range(rows)])


def values(batch: DecodedJob, rows: int = ROWS) -> set[int]:
    return set(batch.images[:rows].unique().tolist())


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(jobs(40), ROWS, config(1), 1)
    yield made
    made.close()


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
    assert {(place - start) % (ROWS * 3 * SIDE * SIDE) for place in places} == {0}


def test_what_is_held_stays_as_it_is_and_stops_nobody(decoder: Decoder) -> None:
    held = list(decoder)
    assert [values(batch) for batch in held] == [{i} for i in range(40)]


def test_a_part_of_a_batch_holds_its_place(decoder: Decoder) -> None:
    parts = []
    for i, batch in enumerate(decoder):
        if i < LENT:
            parts.append(batch.images[1:2, :, ::2].permute(0, 2, 3, 1))
        del batch
    assert [part.unique().tolist() for part in parts] == [[i] for i in range(LENT)]


def test_damage_that_is_passed_over_is_not_printed_about(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "JPEG"))
    data[-200] ^= 0x55
    decode(bytes(data), 3)
    assert "Corrupt JPEG" in capfd.readouterr().err  # the control: this is what libjpeg says in any other process
    decoder = Decoder(iter([DecodeJob(0, [DecodeTask(0, bytes(data), None)])]), ROWS, config(1), 1)
    batch = next(decoder)
    decoder.close()
    assert not batch.failures
    assert capfd.readouterr().err == ""
