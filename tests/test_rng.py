import numpy as np

from dist_obdsd.rng import derive, rng


def test_derived_seeds_never_change_between_versions() -> None:
    # A resumed run must draw what the unbroken one would have: these numbers are part of the checkpoint format.
    assert derive(0) == 2033344993903900207
    assert derive(0, "augment", 1, 2, 3) == 7792243751150332726


def test_every_name_its_type_and_its_place_count() -> None:
    variants = [(0,), (1,), (0, "a"), (0, 1), (0, "1"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", 1, 2),
                (0, "a", 12), (0, "a", 2, 1), (1, "a")]  # fmt: skip
    assert len({derive(*variant) for variant in variants}) == len(variants)


def test_generators_are_fresh_and_their_draws_independent() -> None:
    first, again, other = (rng(7, "mining", step).standard_normal(2000) for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1
