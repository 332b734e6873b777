"""Curves of bounded size that keep extremes, cover the whole run, and let later lines win."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affmae_cli.dashboard.series import Series, smoothed


def filled(values: np.ndarray, capacity: int = 16, batch: int = 7, first: int = 1) -> Series:
    series = Series(capacity)
    x_N = np.arange(first, first + len(values))
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        series.add(x_N[part], {"v": values[part]}, x_N[part] * 10)
    return series


def test_a_short_series_is_kept_point_by_point() -> None:
    series = filled(np.arange(10.0))
    curve = series.curve("v")
    assert series.stride == 1 and series.names == ["v"] and series.extent == (1.0, 10.0)
    assert curve.x_N.tolist() == list(range(1, 11)) and curve.mean_N.tolist() == list(range(10))
    assert (curve.low_N == curve.high_N).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 60), st.integers(4, 40), st.integers(1, 30), st.randoms(use_true_random=False)
)
def test_extremes_and_mean_survive_any_merging(count: int, batch: int, capacity: int, points: int, random) -> None:
    values = np.array([random.choice([math.nan, random.uniform(-5, 5)]) for _ in range(count)], np.float32)
    series = filled(values, capacity, batch)
    curve = series.curve("v", points=points)
    assert len(series) == count and len(curve) <= points
    assert len(series.curve("v", points=10**9)) <= capacity + 1
    assert (np.diff(curve.x_N) > 0).all() and curve.x_N[-1] == count
    if np.isfinite(values).any():
        assert np.nanmin(curve.low_N) == np.nanmin(values) and np.nanmax(curve.high_N) == np.nanmax(values)
        known = np.isfinite(curve.mean_N)
        assert (curve.low_N[known] <= curve.mean_N[known] + 1e-5).all()
        assert (curve.mean_N[known] <= curve.high_N[known] + 1e-5).all()
    else:
        assert np.isnan(curve.mean_N).all()


def test_a_spike_of_one_step_in_a_million_stays() -> None:
    values = np.ones(1_000_000, np.float32)
    values[654_321] = 9.0
    series = Series()
    for start in range(0, len(values), 2700):
        series.add(np.arange(start, min(start + 2700, len(values))), {"v": values[start : start + 2700]})
    curve = series.curve("v", points=100)
    assert curve.high_N.max() == 9.0 and abs(int(curve.x_N[curve.high_N.argmax()]) - 654_321) <= 10_100
    assert curve.mean_N[0] == 1.0


def test_later_lines_win_when_steps_go_back() -> None:
    series = filled(np.zeros(10))
    series.add(np.arange(6, 9), {"v": np.ones(3)})
    curve = series.curve("v")
    assert curve.x_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and curve.mean_N.tolist() == [0] * 5 + [1] * 3
    series.add(np.array([7, 8, 3, 4]), {"v": np.array([2.0, 2, 3, 3])})  # goes back inside one batch
    assert series.curve("v").mean_N.tolist() == [0, 0, 3, 3]


def test_no_stale_value_survives_a_cut_through_merged_points() -> None:
    series = filled(np.zeros(1000), capacity=16)
    stride = series.stride
    series.add(np.arange(500, 600), {"v": np.ones(100)})
    curve = series.curve("v", points=10**9)
    assert stride > 1 and set(curve.mean_N.tolist()) == {0.0, 1.0}
    assert curve.x_N[curve.mean_N == 0].max() >= 500 - stride - 1 and curve.x_N[-1] == 599


def test_columns_that_come_later_are_unknown_before() -> None:
    series = Series(8)
    series.add(np.arange(3), {"a": np.zeros(3)})
    series.add(np.arange(3, 5), {"b": np.ones(2)})
    assert np.isnan(series.curve("b").mean_N[:3]).all() and np.isnan(series.curve("a").mean_N[3:]).all()
    assert len(series.curve("c")) == 0 and len(Series().curve("a")) == 0 and Series().extent is None


def test_a_window_and_where_it_lies_in_the_file() -> None:
    series = filled(np.arange(100.0), capacity=256)
    curve = series.curve("v", low=20, high=29)
    assert curve.x_N.tolist() == list(range(20, 30))
    assert series.byte_range(20, 29) == (200, 300)
    assert series.byte_range(90, 1e9) == (900, None) and series.byte_range(101, 200) == (0, 0)
    coarse = filled(np.arange(1000.0), capacity=16)
    start, end = coarse.byte_range(500, 510)
    assert start <= 5000 and end is not None and end > 5100


def test_smoothing_follows_the_definition_and_passes_over_nan() -> None:
    assert smoothed(np.array([1.0, 1.0, 1.0]), 0.9).tolist() == pytest.approx([1, 1, 1])
    found = smoothed(np.array([1.0, math.nan, 0.0]), 0.5)
    assert found[0] == 1.0 and np.isnan(found[1]) and found[2] == pytest.approx(0.25 / 0.75)
    series = filled(np.array([0.0, 4.0, 0.0, 4.0]))
    curve = series.curve("v", smooth=0.9)
    assert curve.mean_N.max() < 3 and curve.high_N.max() == 4.0
