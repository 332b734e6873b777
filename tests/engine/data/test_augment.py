"""Crop geometry: windows inside the image, antialiased and centred resizing, the symmetries of a square."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affmae_engine.data.augment import Turn, draw_crop, draw_turn, resize


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.integers(1, 128),
    low=st.floats(0.1, 2),
    extra=st.floats(0, 2),
    seed=st.integers(0, 10),
)
def test_crops_lie_inside(height: int, width: int, size: int, low: float, extra: float, seed: int) -> None:
    crop = draw_crop(np.random.default_rng(seed), (height, width), size, (low, low + extra))
    assert 1 <= crop.edge <= min(height, width)
    assert 0 <= crop.y <= height - crop.edge
    assert 0 <= crop.x <= width - crop.edge
    if min(height, width) >= size * (low + extra) + 1:
        assert size * low - 1 <= crop.edge <= size * (low + extra) + 1


def test_crops_reach_every_corner() -> None:
    rng = np.random.default_rng(0)
    places = {(c.y, c.x) for c in (draw_crop(rng, (6, 6), 4, (1.0, 1.0)) for _ in range(200))}
    assert places == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize("edge", [16, 24, 32, 48, 100])
def test_resize_keeps_place_and_mean(edge: int) -> None:
    y, x = np.meshgrid(*[(np.arange(edge) + 0.5) / edge] * 2, indexing="ij")
    ramp = (y + 2 * x).astype(np.float32)
    v, u = np.meshgrid(*[(np.arange(32) + 0.5) / 32] * 2, indexing="ij")
    result = resize(ramp, 32)
    assert result.shape == (32, 32)
    assert result.dtype == np.float32
    assert np.abs(result - (v + 2 * u))[4:-4, 4:-4].max() < 2e-3
    assert abs(result.mean() - ramp.mean()) < 5e-3


def test_reduction_is_antialiased() -> None:
    stripes = np.tile(np.array([-1, 1], np.float32), (128, 64))
    assert np.abs(resize(stripes, 32)).max() < 0.1


def test_no_resize_returns_the_same_pixels() -> None:
    square = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    assert np.array_equal(resize(square, 32), square)


def test_turns_are_the_eight_symmetries() -> None:
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    turned = {Turn(q, m).apply(square).tobytes() for q in range(4) for m in (False, True)}
    assert len(turned) == 8
    rng = np.random.default_rng(0)
    assert len({draw_turn(rng) for _ in range(200)}) == 8
    assert Turn(1, True).apply(square).flags.c_contiguous
