"""The decoder of a GPU with the device ``cpu``: all of it but the lines that name CUDA, and nvJPEG's own pixels."""

import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import gpu
from dist_obdsd.data.decode_tasks import Bad, Row, decode_rows
from dist_obdsd.data.decoding_workers import Decoded, Decoder, Job
from dist_obdsd.data.gpu import DeviceDecoder, build_device_decoder, works_everywhere
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.data.transforms import jpeg_size
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from tests import harness
from tests.data.pictures import colours, encoded
from tests.data.test_resampling import LEVELS
from tests.data.test_stream import CLASSES, config_of, data, joined

__all__ = ["data"]  # the fixture

CPU = torch.device("cpu")
KINDS: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("JPEG", {"subsampling": 0}),
    ("WEBP", {}),
]


def settings(**changes: object) -> Config:
    raw = {
        "name": "x",
        "epochs": 2,
        "data": {"shards": "x", "image_size": 24, "workers": 0} | changes,
        "batch": {"global_size": 16},
    }
    return parse_config(raw, "test")


def noise(i: int) -> Image.Image:
    draw = np.random.default_rng(i)
    return Image.fromarray(draw.integers(0, 256, (*draw.integers(20, 70, 2), 3), dtype=np.uint8))


def rows_of(files: list[bytes]) -> list[Row]:
    return [Row(100 + i, file, (1, 2, i)) for i, file in enumerate(files)]


def broken_tables(whole: bytes) -> bytes:
    """A JPEG whose header can be read, whose end is there, and whose Huffman tables no decoder takes."""
    start = whole.index(b"\xff\xc4") + 5
    return whole[:start] + b"\xff" * 16 + whole[start + 16 :]


def headers_read(rows: list[Row], config: Config, group: int = 2) -> Decoded:
    decoder = Decoder(iter([Job(None, rows)]), len(rows), config, group, leave=True)
    try:
        return next(decoder)
    finally:
        decoder.close()


def on_device(
    rows: list[Row], config: Config, group: int = 2, warn: Callable[[str], None] = print
) -> tuple[torch.Tensor, list[Bad]]:
    return DeviceDecoder(CPU, config, warn)(headers_read(rows, config, group))


def on_cpu(rows: list[Row], config: Config, group: int = 2) -> tuple[torch.Tensor, list[Bad]]:
    s = config.data.image_size
    images = torch.zeros(len(rows), 3, s, s, dtype=torch.uint8)
    return images, decode_rows(rows, images, config, group).bad


def assert_close(found: torch.Tensor, wanted: torch.Tensor, levels: int = LEVELS) -> None:
    assert (found.int() - wanted.int()).abs().max() <= levels


@pytest.fixture
def given_to_the_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files each call of the device's decoder got."""
    calls: list[int] = []
    inner = gpu.decode_jpeg
    monkeypatch.setattr(gpu, "decode_jpeg", lambda files, *rest: calls.append(len(files)) or inner(files, *rest))
    return calls


# ---- which files ----------------------------------------------------------------------------------------------------


def test_the_device_is_given_plain_jpegs_and_their_sizes_are_right() -> None:
    picture = Image.fromarray(colours(20, 30))
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 2}):
        assert jpeg_size(encoded(picture, "JPEG", **options)) == (20, 30)


def test_what_only_the_cpu_reads_alike_is_not_given() -> None:
    picture = Image.fromarray(colours(20, 30))
    whole = encoded(picture, "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    others = {
        "PNG": encoded(picture, "PNG"),
        "grey": encoded(picture.convert("L"), "JPEG"),
        "CMYK": encoded(picture.convert("CMYK"), "JPEG"),
        "RGB": encoded(picture, "JPEG", keep_rgb=True),
        "RGB by Adobe": whole[:2] + b"\xff\xee\x00\x0eAdobe" + bytes(7) + whole[2:],
        "two pictures": encoded(picture, "MPO", save_all=True, append_images=[picture]),
        "turned": encoded(picture, "JPEG", exif=turned),
        "turned by XMP": encoded(picture, "JPEG", xmp=xmp),
        "without an end": whole[:-2],
        "truncated": whole[: len(whole) // 2],
        "without a header": whole[:2] + whole[-2:],
        "of no size": whole.replace(b"\xff\xc0\x00\x11\x08\x00\x14\x00\x1e", b"\xff\xc0\x00\x11\x08\x00\x00\x00\x00"),
        "nothing": b"",
    }
    assert {name: jpeg_size(file) for name, file in others.items()} == dict.fromkeys(others)
    assert jpeg_size(whole) == (20, 30)  # the control


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_a_batch_of_many_kinds_is_that_of_the_cpu(augment: str, given_to_the_device: list[int]) -> None:
    config = settings(augment=augment)
    rows = rows_of([encoded(noise(i), kind, **options) for i, (kind, options) in enumerate(KINDS * 3)])
    found, bad = on_device(rows, config, 1)
    assert given_to_the_device == [9]
    wanted, _ = on_cpu(rows, config, 1)
    assert_close(found, wanted, LEVELS if augment == "crop" else 1)
    assert not bad
    moved, _ = on_device([row._replace(place=(1, 2, 50 + i)) for i, row in enumerate(rows)], config, 1)
    assert torch.equal(moved, found) == (augment == "none")  # the control: the places decide what is drawn


def test_large_images_are_decoded_a_few_at_a_time(
    given_to_the_device: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "TOGETHER", 3 * 70 * 70)
    rows = rows_of([encoded(noise(i), "JPEG") for i in range(10)])
    found, _ = on_device(rows, settings())
    assert sum(given_to_the_device) == 10
    assert 3 <= max(given_to_the_device) < 10
    assert_close(found, on_cpu(rows, settings())[0])


def test_real_photographs_have_the_pixels_of_the_cpu(real_data: Path) -> None:
    with tarfile.open(real_data / "cars196_first98.tar") as tar:
        members = itertools.islice((member for member in tar if member.name.endswith(".jpg")), 48)
        rows = rows_of([tar.extractfile(member).read() for member in members])  # type: ignore[union-attr]
    config = settings(image_size=112)
    found, bad = on_device(rows, config)
    assert not bad
    assert_close(found, on_cpu(rows, config)[0])


# ---- what the device refuses ----------------------------------------------------------------------------------------


def test_a_jpeg_that_only_the_device_refuses_is_decoded_by_the_cpu_and_the_first_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [encoded(noise(i), "JPEG") for i in range(6)]
    inner, calls = gpu.decode_jpeg, []

    def choosy(tensors: list[torch.Tensor], *rest: object) -> list[torch.Tensor]:
        calls.append(len(tensors))
        if any(tensor.numel() in (len(files[1]), len(files[4])) for tensor in tensors):
            raise RuntimeError("unknown chroma subsampling\nand more")
        return inner(tensors, *rest)

    monkeypatch.setattr(gpu, "decode_jpeg", choosy)
    lines: list[str] = []
    device = DeviceDecoder(CPU, settings(), lines.append)
    for asked in ([6] + [1] * 6, [4]):  # not for the same ones again
        found, bad = device(headers_read(rows_of(files), settings()))
        assert calls == asked
        calls.clear()
        assert_close(found, on_cpu(rows_of(files), settings())[0])
        assert not bad
    assert lines == [
        "the GPU's decoder refuses a JPEG (unknown chroma subsampling); the CPU decodes it, and others like it"
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_nobody_can_decode_is_replaced_as_on_the_cpu(workers: int) -> None:
    files = [encoded(noise(i), "PNG" if i == 3 else "JPEG") for i in range(10)]
    for i in (0, 4, 5, 6):
        files[i] = broken_tables(files[i])
    assert [jpeg_size(file) is None for file in files] == [i == 3 for i in range(10)]
    files[9] = files[9][:100]  # not even given to the device
    rows, config, lines = rows_of(files), settings(workers=workers), []
    found, bad = on_device(rows, config, warn=lines.append)
    wanted, wanted_bad = on_cpu(rows, config)
    assert bad == wanted_bad
    assert [(one.row, one.id, one.replacement) for one in bad] == [
        (0, 100, 101), (4, 104, None), (5, 105, None), (6, 106, 107), (9, 109, 108),
    ]  # fmt: skip
    good = [i for i in range(10) if i not in (4, 5)]
    assert_close(found[good], wanted[good])
    assert not lines  # a broken image is told of by the stream


# ---- the stream -----------------------------------------------------------------------------------------------------


def streams(
    data: tuple[Path, Manifest], config: Config, world: int = 1, start: tuple[int, int] = (0, 0), device: bool = True
) -> list[tuple[int, int, torch.Tensor, list[int], list[int]]]:
    parts = []
    for rank in range(world):
        decoder = DeviceDecoder(CPU, config) if device else None
        source = TrainStream(data[1], list(range(CLASSES)), config, rank, world, *start, device_decoder=decoder)
        try:
            parts.append(list(source))
        finally:
            source.close()
    return list(joined(parts))


def assert_same(a: list[tuple], b: list[tuple]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one[:2] + one[3:] == other[:2] + other[3:]
        assert torch.equal(one[2], other[2])


def test_the_same_bits_for_any_ranks_and_workers_and_after_a_resume(
    data: tuple[Path, Manifest], given_to_the_device: list[int]
) -> None:
    alone = streams(data, config_of(data[0]))
    given = sum(given_to_the_device)
    images = sum(len(step[3]) for step in alone)
    assert 0.2 * images < given < 0.5 * images  # every third file is a JPEG
    for world, workers in ((1, 2), (2, 1), (4, 0)):
        assert_same(streams(data, config_of(data[0], workers=workers), world), alone)
    assert_same(streams(data, config_of(data[0]), 2, (1, 1)), [step for step in alone if step[:2] >= (1, 1)])
    for found, wanted in zip(alone, streams(data, config_of(data[0]), device=False), strict=True):
        assert found[:2] + found[3:] == wanted[:2] + wanted[3:]
        assert_close(found[2], wanted[2])


def test_broken_images_count_as_on_the_cpu(data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """One image in the shards is broken when it is read."""
    from dist_obdsd.data import shard_reader as reading

    inner = reading.read_shard

    def spoilt(*arguments: object) -> Iterator[tuple[int, bytes]]:
        for sample_id, file in inner(*arguments):  # type: ignore[arg-type]
            yield sample_id, broken_tables(file) if sample_id == 3 else file

    monkeypatch.setattr(reading, "read_shard", spoilt)
    told: dict[bool, list[str]] = {True: [], False: []}
    replaced: dict[bool, list[tuple[int, list[str], list[int]]]] = {True: [], False: []}
    config = config_of(data[0], max_bad_samples=1)
    for device in (True, False):
        source = TrainStream(
            data[1], list(range(CLASSES)), config, 0, 1, warn=told[device].append,
            device_decoder=DeviceDecoder(CPU, config, told[device].append) if device else None,
        )  # fmt: skip
        replaced[device] = [(batch.step, batch.replaced, batch.ids_b.tolist()) for batch in source]
        source.close()
    assert replaced[True] == replaced[False]
    assert ["00000003"] in [names for _, names, _ in replaced[True]]
    assert told[True] == told[False]
    assert len(told[True]) == 1
    with pytest.raises(RunError, match=r"sample 00000003 .* cannot be decoded: .*max_bad_samples=0"):
        streams(data, config_of(data[0]))


# ---- whether --------------------------------------------------------------------------------------------------------


def on_all_ranks(lacking: list[int]) -> tuple[bool, list[str]]:
    """On a rank of ``lacking``, torchvision is one without nvJPEG."""

    def refuse(*arguments: object) -> list[torch.Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat line 1")

    inner, lines = gpu.decode_jpeg, []
    if collectives.rank() in lacking:
        gpu.decode_jpeg = refuse
    try:
        return works_everywhere(DeviceDecoder(CPU, settings()), lines.append), lines
    finally:
        gpu.decode_jpeg = inner


def test_one_rank_without_a_decoder_sends_all_to_the_cpu_and_one_line_says_so() -> None:
    assert harness.run(3, on_all_ranks, []) == [(True, [])] * 3
    line = (
        "the CPU decodes the images, since rank 1 cannot decode a JPEG on its GPU: "
        "decode_jpegs_cuda: torchvision not compiled with nvJPEG support"
    )
    assert harness.run(3, on_all_ranks, [1, 2]) == [(False, [line])] * 3


def test_a_run_without_a_gpu_is_refused_unless_the_cpu_is_to_decode() -> None:
    assert build_device_decoder(settings(), CPU, print, print) is None
    with pytest.raises(InputError, match=r"data.decode=gpu, but this run has no GPU; set data.decode=cpu, or run it"):
        build_device_decoder(settings(decode="gpu"), CPU, print, print)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_says_nothing_about_an_image_is_not_held_against_it(
    monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]
) -> None:
    def fail(*arguments: object) -> list[torch.Tensor]:
        raise error("the GPU is in trouble")

    rows = rows_of([encoded(noise(i), "JPEG") for i in range(2)])
    monkeypatch.setattr(gpu, "decode_jpeg", fail)
    with pytest.raises(error, match="in trouble"):
        on_device(rows, settings())
