"""Charts as characters: where lines run, what axes and labels say, what zoom and cursor show."""

import math

import numpy as np
import pytest

from affmae_cli.dashboard.plot import (
    AXIS,
    ChartView,
    Curve,
    Drawing,
    draw,
    linear_ticks,
    log_ticks,
    tick_label,
    value_at,
)
from affmae_cli.dashboard.text import count

RAW = ChartView(smoothing=False)


def curve(*y: float, name: str = "loss", marks: bool = False) -> Curve:
    return Curve(name, "#FFFFFF", np.arange(len(y), dtype=float), np.stack([np.array(y, float)] * 3), marks)


def drawn(*curves: Curve, size: tuple[int, int] = (60, 12), view: ChartView = RAW, **options: object) -> Drawing:
    found = draw(curves, *size, view, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def rows(found: Drawing) -> list[str]:
    return ["".join(piece for piece, _, _ in row) for row in found.lines]


def dots(found: Drawing, ink: int = 0) -> list[tuple[int, int]]:
    """(row, column) of every cell that a curve has inked."""
    cells = []
    for number, line in enumerate(found.lines):
        at = 0
        for text, of, _ in line:
            if of == ink and at < found.left + found.columns:
                cells += [(number, at + i) for i, char in enumerate(text) if not char.isspace()]
            at += len(text)
    return cells


def test_a_rising_line_runs_from_corner_to_corner() -> None:
    cells = dots(drawn(curve(0, 1, 2, 3)))
    assert min(cells)[0] == 0 and max(cells)[0] == 9
    left, right = min(column for _, column in cells), max(column for _, column in cells)
    assert max(row for row, column in cells if column == left) == 9
    assert min(row for row, column in cells if column == right) == 0


def test_nan_breaks_a_line() -> None:
    found = drawn(curve(1, 1, math.nan, 1, 1))
    columns = {column for _, column in dots(found)}
    assert len(columns) < found.columns * 0.6


@pytest.mark.parametrize("size", [(60, 4), (60, 8), (100, 20)])
def test_a_chart_has_the_size_asked_for_and_labels_every_curve(size: tuple[int, int]) -> None:
    found = drawn(curve(5, 1, name="a"), curve(5, 1.01, name="b"), curve(9, 9, name="held-out", marks=True), size=size)
    lines = rows(found)
    assert [len(line) for line in lines] == [size[0]] * size[1]
    if size[1] > 4:
        assert all(any(label in line for line in lines) for label in ("a 1", "b 1.01", "held-out 9"))


def test_a_spike_between_the_points_of_a_long_curve_is_drawn() -> None:
    y = np.ones(5000)
    y[1234] = 100.0
    cells = dots(drawn(Curve("loss", "#FFFFFF", np.arange(5000.0), np.stack([y] * 3))))
    assert min(row for row, _ in cells) == 0


def test_smoothing_draws_the_mean_over_the_faint_values() -> None:
    y = np.where(np.arange(400) % 2, 1.0, 3.0)
    found = drawn(Curve("loss", "#FFFFFF", np.arange(400.0), np.stack([y] * 3)), view=ChartView())
    faint = [text for line in found.lines for text, ink, faint in line if ink == 0 and faint]
    assert faint and any(ink == 0 and not pale for line in found.lines for _, ink, pale in line)
    assert any("loss 3" in row or "loss 2" in row or "loss 1" in row for row in rows(found))


def test_the_cursor_labels_the_values_there() -> None:
    found = drawn(curve(3, 5, 9, 7), view=ChartView(smoothing=False, cursor=1.0))
    assert any("loss 5" in row for row in rows(found)) and any("│" in row[found.left :] for row in rows(found))
    assert value_at(curve(3, 5, 9), 1.4) == 5.0 and math.isnan(value_at(curve(), 1.0))


def test_a_zoomed_view_fits_its_axis_to_what_is_seen() -> None:
    found = drawn(curve(*([100.0] * 50 + [1.0] * 50)), view=ChartView(smoothing=False, span=(60.0, 90.0)))
    assert not any("100" in row[: found.left] for row in rows(found))
    assert found.x_at(found.left) == 60.0 and found.x_at(found.left + found.columns - 1) == 90.0
    assert found.x_at(0) is None


def test_a_log_axis_leaves_out_what_has_no_logarithm() -> None:
    view = ChartView(log=True, smoothing=False)
    found = drawn(curve(-1.0, 0.0, 10.0, 1000.0), view=view)
    assert any(row.lstrip().startswith("100") for row in rows(found))
    assert draw([curve(-1.0, 0.0)], 60, 12, view) is None
    assert drawn(curve(-1.0, 1.0), view=view, may_log=False)


def test_there_is_nothing_to_draw() -> None:
    assert draw([], 60, 12, RAW) is None and draw([curve(math.nan)], 60, 12, RAW) is None
    assert draw([curve(1, 2)], 6, 2, RAW) is None
    assert drawn(curve(4.0)).lines[0][0][1] == AXIS  # a single point


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
    assert [count(v) for v in (0, 999, 1500, 250_000, 1e6, 1.25e6)] == ["0", "999", "1.5k", "250k", "1M", "1.25M"]
