"""Charts as characters: where lines run, what axes say, what zooming shows."""

import math

import numpy as np
import pytest

from affmae_cli.dashboard.frame import draw_frame
from affmae_cli.dashboard.plot import GRID, MARK, Trace, View, draw, fitting_view, layers, smooth, value_at
from affmae_cli.dashboard.ticks import count_label, linear_ticks, log_ticks, tick_label
from affmae_cli.dashboard.zoom import Zoom


def line(*y: float, name: str = "loss", ink: int = 0, marks: bool = False) -> Trace:
    return Trace(name, np.arange(len(y), dtype=float), np.array(y, float), ink=ink, marks=marks)


def text(frame_lines: list[list[tuple[str, int, bool]]]) -> list[str]:
    return ["".join(piece for piece, _, _ in row) for row in frame_lines]


def test_a_rising_line_runs_from_corner_to_corner() -> None:
    raster = draw([line(0, 1, 2, 3)], View(0, 3, 0, 3), columns=4, rows=2)
    assert raster.chars[1, 0] != " " and raster.chars[0, 3] != " "
    assert raster.chars[0, 0] == " " and raster.chars[1, 3] == " "
    assert (raster.ink[raster.chars != " "] == 0).all()


def test_nan_breaks_a_line_and_what_lies_outside_is_cut_off() -> None:
    broken = draw([line(1, math.nan, 1)], View(0, 2, 0, 2), columns=9, rows=3)
    assert (broken.chars[:, 3:6] == " ").all() and (broken.chars[:, 0] != " ").any()
    outside = draw([line(50, 50)], View(0, 1, 0, 2), columns=9, rows=3)
    assert (outside.chars == " ").all()


def test_the_grid_stays_behind_lines_and_marks_are_signs_of_their_own() -> None:
    raster = draw([line(1, 1), line(2, 2, marks=True)], View(0, 1, 0, 2), columns=10, rows=5, grid=[1.0, 0.0])
    assert GRID not in raster.chars[2] and (raster.chars[4] == GRID).all()
    assert raster.chars[0, 0] == raster.chars[0, -1] == MARK


@pytest.mark.parametrize("log", [False, True])
def test_a_fitting_view_holds_every_point(log: bool) -> None:
    view = fitting_view([line(0.1, 5.0, 2.0)], 0, 2, log=log)
    assert view is not None and view.y0 < 0.1 and view.y1 > 5.0 and view.log is log


def test_a_log_view_leaves_out_what_has_no_logarithm() -> None:
    view = fitting_view([line(-1.0, 0.0, 10.0, 100.0)], 0, 3, log=True)
    assert view is not None and 5 < view.y0 < 10
    assert fitting_view([line(-1.0, 0.0)], 0, 1, log=True) is None
    assert fitting_view([line(math.nan)], 0, 1, log=False) is None


def test_smoothing_keeps_a_straight_line_and_passes_over_nan() -> None:
    straight = np.linspace(3, 7, 50)
    np.testing.assert_allclose(smooth(straight, 9), straight)
    holed = smooth(np.array([1.0, math.nan, 3.0, 3.0, 5.0]), 3)
    assert math.isnan(holed[1]) and holed[2] == 3.0


def test_the_raw_line_behind_a_smoothed_one_passes_through_the_extremes() -> None:
    trace = Trace("loss", np.array([1.0, 2.0]), np.array([5.0, 5.0]), np.array([1.0, 4.0]), np.array([9.0, 6.0]))
    behind, above = layers([trace], 0, 2, smoothing=True)
    assert behind.faint and behind.y.tolist() == [1.0, 9.0, 4.0, 6.0] and not above.faint
    (alone,) = layers([trace], 0, 2, smoothing=False)
    assert alone.y.tolist() == [1.0, 9.0, 4.0, 6.0] and not alone.faint


@pytest.mark.parametrize("height", [4, 8, 20])
def test_a_frame_has_the_size_asked_for_and_names_every_line(height: int) -> None:
    traces = [line(5, 1, name="a", ink=1), line(5, 1.01, name="b", ink=2), line(9, 9, name="held-out", marks=True)]
    view = fitting_view(traces, 0, 1, log=False)
    assert view is not None
    rows = text(draw_frame(traces, view, 60, height).lines)
    assert [len(row) for row in rows] == [60] * height
    if height > 4:
        assert all(any(label in row for row in rows) for label in ("a 1.0000", "b 1.0100", "held-out 9.0000"))


def test_the_place_under_the_pointer_is_a_step() -> None:
    frame = draw_frame([line(*range(101))], View(0, 100, 0, 100), 60, 10)
    assert (
        frame.x_at(0) is None and frame.x_at(frame.left) == 0.0 and frame.x_at(frame.left + frame.columns - 1) == 100.0
    )
    assert value_at(line(3, 5, 9), 1.4) == 5.0


def test_too_small_a_frame_is_blank() -> None:
    assert text(draw_frame([line(1, 2)], View(0, 1, 1, 2), 6, 3).lines) == [" " * 6] * 3


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 1e6, 4, [0, 5e5, 1e6]),
        (1, 1, 5, []),
        (0, math.inf, 5, []),
        (0.55, 1.25, 2, [0.6, 0.8, 1.0, 1.2]),
        (0.99, 1.01, 2, [0.99, 1.0, 1.01]),
    ],
)
def test_linear_ticks(low: float, high: float, most: int, ticks: list[float]) -> None:
    assert linear_ticks(low, high, most) == pytest.approx(ticks)


def test_log_ticks() -> None:
    assert log_ticks(0.09, 11, 4) == pytest.approx([0.1, 1, 10])
    assert log_ticks(0.2, 0.31, 6) == pytest.approx([0.2, 0.22, 0.24, 0.26, 0.28, 0.3])
    assert len(log_ticks(1e-9, 1e9, 5)) <= 5


def test_labels_of_ticks() -> None:
    assert [tick_label(v, 0.05) for v in (0.0, 0.05, 1.0)] == ["0.00", "0.05", "1.00"]
    assert [tick_label(v, 1e-4) for v in (2e-4, 1e-3)] == ["2e-4", "0.0010"]
    assert [count_label(v) for v in (0, 999, 1500, 250_000, 1e6, 1.25e6)] == ["0", "999", "1.5k", "250k", "1M", "1.25M"]


def test_zooming_in_follows_the_newest_step_until_one_pans_away() -> None:
    zoom = Zoom().closer(0, 1000)
    assert zoom.window(0, 1000) == (500, 1000) and zoom.window(0, 1200) == (700, 1200)
    away = zoom.panned(0, 1000, -0.5)
    assert away.window(0, 1000) == away.window(0, 1200) == (250, 750)
    assert away.panned(0, 1000, 5).window(0, 1200) == (700, 1200)
    assert away.panned(0, 1000, -9).window(0, 1000) == (0, 500)
    assert away.wider(0, 1000).whole


def test_zooming_at_a_step_keeps_it_where_it_is() -> None:
    x0, x1 = Zoom().closer(0, 1000, at=200).window(0, 1000)
    assert (x0, x1) == (100, 600) and (200 - x0) / (x1 - x0) == 0.2
    narrow = Zoom()
    for _ in range(30):
        narrow = narrow.closer(0, 1000)
    assert narrow.span == 10
