"""The search for the largest batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affmae_engine.bench.largest import PRECISION, largest_that_fits


@given(limit=st.integers(0, 5000), guess=st.integers(-3, 6000), most=st.integers(1, 4096))
def test_it_finds_the_limit(limit: int, guess: int, most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_that_fits(fits, guess, most)
    true = min(limit, most)
    assert found <= true and true - found <= max(1, true // PRECISION)
    assert found == 0 or found in tried
    assert len(tried) == len(set(tried)) <= 20 and all(1 <= batch <= most for batch in tried)


@pytest.mark.parametrize("limit", [0, 1, 2, 15])
def test_small_limits_are_exact(limit: int) -> None:
    assert largest_that_fits(lambda batch: batch <= limit, 8, 4096) == limit


def test_a_good_guess_is_cheap() -> None:
    tried: list[int] = []
    largest_that_fits(lambda batch: tried.append(batch) or batch <= 100, 98, 4096)
    assert len(tried) <= 6
