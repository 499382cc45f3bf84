from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_obdsd.data.packing import shard_assignment as assignment


@given(images=st.integers(2, 3000), k=st.integers(2, 20))
def test_blocks_are_near_equal_and_lose_no_group(images: int, k: int) -> None:
    images = max(images, k)
    sizes = assignment.cut_blocks(images, k)
    assert sum(sizes) == images
    assert min(sizes) >= k
    assert max(sizes) - min(sizes) <= k
    assert max(sizes) < max(assignment.BLOCK, k) + k
    assert sum(size // k for size in sizes) == images // k
    # Multiples of K but for the remainder.
    assert sum(size % k for size in sizes) == images % k


@given(units=st.integers(1, 10**6), size=st.integers(0, 10**12), fewest=st.integers(1, 64))
def test_shards_are_a_multiple_of_64_or_a_power_of_two(units: int, size: int, fewest: int) -> None:
    count = assignment.shard_count(units, size, fewest)
    assert count == 1 or units // count >= fewest
    if units >= 64 * fewest:
        assert count % 64 == 0
        assert count == 64 or size / count >= assignment.SHARD_BYTES
    else:
        assert count & (count - 1) == 0
        assert units < 2 * count * fewest  # twice as many would have too few each


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(2, 60), min_size=2, max_size=40), k=st.integers(2, 5), seed=st.integers(0, 99))
def test_training_shards_have_equal_group_counts(sizes: list[int], k: int, seed: int) -> None:
    members, start = {}, 0
    for class_id, size in enumerate(max(size, k) for size in sizes):
        members[class_id] = list(range(start, start + size))
        start += size
    class_of = {i: class_id for class_id, ids in members.items() for i in ids}
    groups = sum(len(ids) // k for ids in members.values())
    shards = assignment.shard_count(groups, 0, assignment.FEWEST_GROUPS)
    assigned = assignment.assign_training(members, k, shards, seed)
    assert len(assigned) == shards
    assert sorted(i for shard in assigned for i in shard) == list(range(start))
    counts = []
    for shard in assigned:
        present = Counter(class_of[i] for i in shard)
        assert min(present.values()) >= k
        counts.append(sum(n // k for n in present.values()))
    # Two blocks of one class may meet in a shard and make one group more of their remainders.
    together = sum(counts) - groups
    assert max(counts) - min(counts) <= 1 + together
    assert assigned == assignment.assign_training(members, k, shards, seed)


def test_test_images_are_shared_out_evenly() -> None:
    assert sorted(map(len, assignment.assign_evenly(range(100), 8, 0, "test"))) == [12] * 4 + [13] * 4
