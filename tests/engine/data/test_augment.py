"""Crop geometry: windows inside the image, and all turns."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from affmae_engine.data.augment import draw_crop, draw_turn


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


def test_every_turn_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {draw_turn(rng) for _ in range(200)} == set(range(8))
