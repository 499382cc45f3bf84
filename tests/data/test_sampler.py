"""Balanced batches for other people's loops: of a map-style dataset, and of shards."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dist_obdsd import BalancedBatchSampler, BalancedStream
from dist_obdsd.config import changed_settings, parse_config
from dist_obdsd.errors import InputError
from dist_obdsd.inference import inference_config

LABELS = np.random.default_rng(0).integers(0, 30, 700)
STREAM = {"global_batch_size": 16, "image_size": 16, "channels": 1, "transform": "affine", "lanes": 4, "num_workers": 0}


def sampler(rank: int = 0, ranks: int = 1, **more: Any) -> BalancedBatchSampler:
    return BalancedBatchSampler(LABELS, 24, 4, **{"rank": rank, "world_size": ranks, **more})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_global_batches_do_not_depend_on_the_ranks(ranks: int) -> None:
    parts = [list(sampler(rank, ranks)) for rank in range(ranks)]
    together = [[i for part in step for i in part] for step in zip(*parts, strict=True)]
    assert together == list(sampler())
    for step in together:
        assert len(set(step)) == 24
        assert set(Counter(LABELS[step]).values()) == {4}


def test_an_epoch_shows_each_image_once_and_the_next_is_another() -> None:
    one = sampler()
    first = [i for step in one for i in step]
    assert len(set(first)) == len(first) == 24 * len(one)
    assert one.plan.coverage > 0.9
    one.set_epoch(1)
    assert [i for step in one for i in step] != first
    one.set_epoch(0)
    assert [i for step in one for i in step] == first
    assert [i for step in sampler(seed=1) for i in step] != first
    named = BalancedBatchSampler([f"class {label:02d}" for label in LABELS], 24, 4)  # labels may be names
    assert [i for step in named for i in step] == first
    assert named.classes[0] == "class 00"


def test_a_loader_takes_it_and_a_resumed_one_goes_on() -> None:
    data = TensorDataset(torch.arange(700), torch.from_numpy(LABELS))
    one = sampler()
    one.set_epoch(2)
    whole = [batch[0].tolist() for batch in DataLoader(data, batch_sampler=one)]
    state = one.state_dict(steps_done=5)
    other = sampler(1, 2)
    other.load_state_dict(state)
    assert len(other) == len(one) - 5
    rest = [batch[0].tolist() for batch in DataLoader(data, batch_sampler=other)]
    assert rest == [step[12:] for step in whole[5:]]
    with pytest.raises(InputError, match="other labels"):
        sampler(seed=3).load_state_dict(state)


@pytest.mark.parametrize(
    ("labels", "size", "ranks", "fact"),
    [
        (LABELS, 24, 5, "24"),
        (LABELS, 30, 1, "30"),
        ([], 24, 1, r"\(0,\)"),
        ([[1, 2]], 24, 1, r"\(1, 2\)"),
        ([1, 1, 2, 2], 24, 1, "24"),
    ],
)
def test_impossible_sizes_are_refused(labels: Any, size: int, ranks: int, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        BalancedBatchSampler(labels, size, 4, rank=0, world_size=ranks)


def steps_of(stream: BalancedStream, epochs: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    steps = [(images.clone(), labels) for _ in range(epochs) for images, labels in stream]
    stream.close()
    return steps


@pytest.fixture(scope="module")
def whole(shards: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return steps_of(BalancedStream(str(shards), **STREAM), 2)


def test_a_stream_gives_the_ranks_their_rows_of_the_same_batches(shards: Path, whole: list) -> None:
    parts = [steps_of(BalancedStream(str(shards), **STREAM, rank=rank, world_size=2), 2) for rank in (0, 1)]
    assert len(whole) == 12
    for one, *halves in zip(whole, *parts, strict=True):
        assert one[0].dtype == torch.uint8
        assert tuple(one[0].shape) == (16, 1, 16, 16)
        assert set(Counter(one[1].tolist()).values()) == {2}
        for i in (0, 1):
            assert torch.equal(one[i], torch.cat([half[i] for half in halves]))


def test_a_stream_goes_on_from_its_state(shards: Path, whole: list) -> None:
    stream = BalancedStream(str(shards), **STREAM)
    assert len(stream) == 6
    assert stream.num_classes == 12 == len(stream.classes)
    steps = iter(stream)
    for _ in range(4):
        next(steps)
    state = stream.state_dict()
    stream.close()
    other = BalancedStream(str(shards), **STREAM)
    other.load_state_dict(state)
    rest = steps_of(other, 2)
    assert len(rest) == 8
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a[0], b[0])
    with pytest.raises(InputError, match="digest ffff"):
        other.load_state_dict({**state, "manifest": "f" * 64})


def test_the_sampling_that_has_gone_names_its_successor(shards: Path) -> None:
    for make in (
        lambda: sampler(sampling="class_uniform"),
        lambda: BalancedStream(str(shards), **STREAM, sampling="class_uniform"),
    ):
        with pytest.raises(InputError, match="class_uniform.*released"):
            make()
    config = parse_config({"name": "x", "epochs": 2, "data": {"shards": "x", "mean": [0.5], "std": [0.5]}}, "x")
    raw, new = config.model_dump(mode="json"), config.model_dump(mode="json")
    raw["data"]["sampling"], new["data"]["sampling"] = "class_uniform", "released"
    assert changed_settings(raw, new) == ["data.sampling: class_uniform -> released"]  # a run that resumes
    assert inference_config({"config": raw}).data.shards == "none"  # its weights serve


def test_a_stream_refuses_what_the_settings_refuse(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 ranks"):
        BalancedStream(str(shards), **STREAM, rank=0, world_size=3)
    with pytest.raises(InputError, match="immage_size"):
        BalancedStream(str(shards), **STREAM, immage_size=3)
    with pytest.raises(InputError, match="nothing"):
        BalancedStream(str(tmp_path / "nothing"), **STREAM)
