"""The tile grid and its weights, for lengths, tiles and overlaps of every proportion."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affmae_engine.predict.tiling import Axis, gaussian_window, reflect, tile_starts

cases = given(
    length=st.integers(1, 400), tile=st.integers(1, 96), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75, 0.9])
)


@cases
@settings(deadline=None, max_examples=150)
def test_weights_are_a_partition_of_unity(length: int, tile: int, overlap: float) -> None:
    axis = Axis(length, tile, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for index, start in enumerate(axis.starts):
        first, last = max(0, start), min(length, start + tile)
        total[first:last] += axis.weights[index, first - start : last - start].double()
        outside = torch.ones(tile, dtype=torch.bool)
        outside[first - start : last - start] = False
        assert not axis.weights[index][outside].any()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6, rtol=0)


@cases
@settings(deadline=None, max_examples=150)
def test_covering_tiles_are_those_that_reach_a_window(length: int, tile: int, overlap: float) -> None:
    axis = Axis(length, tile, overlap)
    for first, last in ((0, length), (length // 3, length // 3 + 1), (length // 2, length)):
        reaching = [i for i, start in enumerate(axis.starts) if start < last and start + tile > first]
        assert list(axis.covering(first, last)) == reaching


def test_border_pixels_are_covered_like_inner_ones() -> None:
    starts = tile_starts(1000, 256, 0.5)
    cover = np.array([sum(start <= pixel < start + 256 for start in starts) for pixel in range(1000)])
    assert set(cover) == {2}
    assert starts[0] == -128 and starts[1] - starts[0] == 128


def test_tile_starts_of_a_short_axis() -> None:
    assert tile_starts(1, 8, 0.5) == [-4, 0]
    assert tile_starts(3, 8, 0.0) == [-4]
    assert tile_starts(8, 8, 0.5) == [-4, 0, 4]
    assert tile_starts(3, 8, 0.5) == [-4, 0]


@pytest.mark.parametrize("arguments", [(0, 8, 0.5), (8, 0, 0.5), (8, 8, 1.0), (8, 8, -0.1)])
def test_nonsense_is_refused(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        tile_starts(*arguments)


def test_reflection_matches_numpy() -> None:
    line = np.arange(7)
    assert np.array_equal(line[reflect(np.arange(-20, 30), 7)], np.pad(line, (20, 23), mode="reflect"))
    assert np.array_equal(reflect(np.arange(-3, 4), 1), np.zeros(7, int))


def test_window_is_symmetric_and_highest_in_the_middle() -> None:
    window = gaussian_window(32)
    assert torch.equal(window, window.flip(0)) and int(window.argmax()) in (15, 16)
    assert window.min() > 0
