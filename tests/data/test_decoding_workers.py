"""The decoding processes: what they deliver, and where it lies."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from PIL import Image

from dist_obdsd.data.decoding_workers import LENT, SLOTS, DecodedJob, DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.images import decode
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
