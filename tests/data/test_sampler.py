"""Balanced batches for other people's loops: of a map-style dataset, and of shards."""

from collections import Counter
from contextlib import closing
from functools import partial
from itertools import islice
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
    return BalancedBatchSampler(LABELS, 24, 4, rank=rank, world_size=ranks, **more)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_global_batches_do_not_depend_on_the_ranks(ranks: int) -> None:
    parts = [sampler(rank, ranks) for rank in range(ranks)]
    together = [np.concatenate(step).tolist() for step in zip(*parts, strict=True)]
    assert together == list(sampler())
    for step in together:
        assert len(set(step)) == 24
        assert set(Counter(LABELS[step]).values()) == {4}


def test_an_epoch_shows_each_image_once_and_the_next_is_another() -> None:
    one = sampler()
    first = list(one)
    assert len(np.unique(first)) == np.size(first) == 24 * len(one) > 0.9 * len(LABELS)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first != list(sampler(seed=1))
    named = BalancedBatchSampler([f"class {label:02d}" for label in LABELS], 24, 4)  # labels may be names
    assert list(named) == first
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
        (LABELS, 0, 1, "is 0"),
        ([], 24, 1, r"\(0,\)"),
        ([[1, 2]], 24, 1, r"\(1, 2\)"),
        ([1, 1, 2, 2], 24, 1, "24"),
    ],
)
def test_impossible_sizes_are_refused(labels: Any, size: int, ranks: int, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        BalancedBatchSampler(labels, size, 4, rank=0, world_size=ranks)


def steps_of(stream: BalancedStream) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The steps of two epochs, from where the stream stands."""
    with closing(stream):
        return [(images.clone(), labels) for _ in range(2) for images, labels in stream]


def test_a_stream_goes_on_from_its_state_on_other_ranks(shards: Path) -> None:
    make = partial(BalancedStream, str(shards), **STREAM)
    whole = steps_of(make())
    assert len(whole) == 12
    with closing(make()) as begun:
        assert (len(begun), begun.num_classes, len(begun.classes)) == (6, 12, 12)
        list(islice(begun, 4))
        state = begun.state_dict()
    ranks = [make(rank=rank, world_size=2) for rank in (0, 1)]
    with pytest.raises(InputError, match="digest ffff"):
        ranks[0].load_state_dict({**state, "manifest": "f" * 64})
    for rank in ranks:
        rank.load_state_dict(state)
    for one, *halves in zip(whole[4:], *map(steps_of, ranks), strict=True):
        assert one[0].dtype == torch.uint8
        assert tuple(one[0].shape) == (16, 1, 16, 16)
        assert set(Counter(one[1].tolist()).values()) == {2}
        for i in (0, 1):
            assert torch.equal(one[i], torch.cat([half[i] for half in halves]))


def test_the_sampling_that_has_gone_names_its_successor(shards: Path) -> None:
    for make in (sampler, partial(BalancedStream, str(shards), **STREAM)):
        with pytest.raises(InputError, match="class_uniform.*released"):
            make(sampling="class_uniform")
    config = parse_config({"name": "x", "epochs": 2, "data": {"shards": "x", "mean": [0.5], "std": [0.5]}}, "x")
    raw, new = config.model_dump(mode="json"), config.model_dump(mode="json")
    raw["data"]["sampling"], new["data"]["sampling"] = "class_uniform", "released"
    assert changed_settings(raw, new) == ["data.sampling: class_uniform -> released"]  # a run that resumes
    assert inference_config({"config": raw}).data.shards == "none"  # its weights serve


def test_a_stream_refuses_what_the_settings_refuse(shards: Path, tmp_path: Path) -> None:
    for root, more, fact in (
        (shards, {"rank": 0, "world_size": 3}, "3 ranks"),
        (shards, {"immage_size": 3}, "immage_size"),
        (tmp_path / "nothing", {}, "nothing"),
    ):
        with pytest.raises(InputError, match=fact):
            BalancedStream(str(root), **STREAM, **more)
