"""The tests' own process groups: a rank that fails is named, and the next test meets sound ones."""

import os

import pytest

from tests import harness


def fails(rank: int, how: str) -> int:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        if how == "dies":
            os._exit(3)
        raise ValueError("on purpose")
    return dist.get_rank()


@pytest.mark.parametrize(("how", "words"), [("raises", "ValueError: on purpose"), ("dies", "ended with 3")])
def test_a_rank_that_fails_is_named_and_the_next_group_is_sound(how: str, words: str) -> None:
    assert harness.run(2, fails, 2, how) == [0, 1]
    with pytest.raises(AssertionError, match=f"rank 1:\n(.*\n)*.*{words}"):
        harness.run(2, fails, 1, how)
    assert harness.run(2, fails, 2, how) == [0, 1]
