"""Curves as text: a braille raster with axes and labels, in pure numpy. The widget `Chart` turns inks into colors.

A character cell is 2 x 4 dots and has the ink of the last curve that touched it, so the curve that matters most is
drawn last. Curves are labeled with their names and values at the right, so they are not told apart by color alone.

Axes: N points, R C rows and columns of characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from affmae_cli.dashboard.columns import Columns, Floats, downsampled
from affmae_cli.dashboard.text import count, cut, label

NO_INK, GRID, AXIS, CURSOR = -1, -2, -3, -4
"""Inks besides the numbers of curves."""
Span = tuple[str, int, bool]
"""Text, its ink, and whether it is faint."""

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.uint8)  # bits by (row, column) in a cell
_SMOOTHED_SHARE = 40  # the moving mean spans this fraction of the visible points
_ROWS_PER_TICK, _COLUMNS_PER_TICK = 3, 9
_LONGEST_LABEL = 26


@dataclass(frozen=True, eq=False)
class Curve:
    """A named line. x_N rising; y_3N: mean, lowest and highest value. marks: points as well as a line."""

    name: str
    color: str
    x_N: Floats
    y_3N: Floats
    marks: bool = False


@dataclass(frozen=True)
class ChartView:
    """What part of charts is seen, and how. span: (first, last) x that is zoomed in on; None: everything. cursor: the x
    whose values are labeled; None: the newest."""

    log: bool = False
    smoothing: bool = True
    span: tuple[float, float] | None = None
    cursor: float | None = None


@dataclass(frozen=True)
class Drawing:
    """A chart of exactly the lines and columns that were asked for. left, columns: place of the plot in a line.
    x0, x1: its ends."""

    lines: list[list[Span]]
    left: int
    columns: int
    x0: float
    x1: float

    def x_at(self, column: int) -> float | None:
        """The x of a column of the whole chart; None beside the plot."""
        at = column - self.left
        return self.x0 + at / max(self.columns - 1, 1) * (self.x1 - self.x0) if 0 <= at < self.columns else None


def curve_of(
    columns: Columns, column: str, name: str, color: str, *, factor: float = 1.0, marks: bool = False
) -> Curve:
    """A column as a curve, its values times `factor`."""
    x_N, y_3N = columns.get(column)
    return Curve(name, color, x_N, y_3N * factor, marks)


def draw(
    curves: Sequence[Curve],
    width: int,
    height: int,
    view: ChartView,
    *,
    floor: float | None = None,
    may_log: bool = True,
    may_smooth: bool = True,
) -> Drawing | None:
    """Curves with axes; None when there is nothing to draw in this view or this size.

    Args:
        curves: the most important one first.
        width, height: columns and rows of characters for everything.
        view: what part is seen.
        floor: lowest end of the vertical axis, if it is fixed.
        may_log, may_smooth: whether the logarithmic axis and moving means of `view` make sense here.
    """
    curves = [curve for curve in curves if len(curve.x_N)]
    if not curves or height < 3 or width < 20:
        return None
    # The visible part, one point more on either side so that lines reach the edges.
    x0, x1 = view.span or (min(c.x_N[0] for c in curves), max(c.x_N[-1] for c in curves))
    x1 = max(x1, x0 + 1e-9) if x1 > x0 else x0 + 1
    shown = [_visible(curve, x0, x1, 2 * width) for curve in curves]
    log = view.log and may_log
    smoothing = view.smoothing and may_smooth
    means = [c if c.marks or not smoothing else replace(c, y_3N=_smooth(c.y_3N)) for c in shown]
    axis = _vertical(shown, x0, x1, log, floor)
    if axis is None:
        return None
    # Labels right and ticks left decide how much room the plot has.
    below = 2 if height >= 9 else 1
    rows = height - below
    at = None if view.cursor is None else min(max(view.cursor, x0), x1)
    labels = _labels(means, at, axis, rows)
    right = min(max((cell_len(text) + 2 for _, text, _ in labels), default=0), _LONGEST_LABEL, width // 3)
    ticks = (log_ticks if log else linear_ticks)(axis.low, axis.high, max(2, rows // _ROWS_PER_TICK))
    step = min((b - a for a, b in pairwise(ticks)), default=0.0)
    texts = {axis.row(tick, rows): tick_label(tick, step) for tick in ticks}
    left = max((len(text) for text in texts.values()), default=0) + 1
    columns = width - left - right
    if columns < 8:
        return None
    # Faint extremes below, means above, the first curve on top.
    raster = _Raster(rows, columns)
    for number_, curve in reversed(list(enumerate(shown))):
        if not curve.marks:
            spread = np.stack([curve.y_3N[1], curve.y_3N[2]], axis=1).ravel()
            raster.line(np.repeat(curve.x_N, 2), spread, axis, x0, x1, number_, faint=smoothing)
    for number_, curve in reversed(list(enumerate(means))):
        if smoothing or curve.marks:
            raster.line(curve.x_N, curve.y_3N[0], axis, x0, x1, number_, marks=curve.marks)
    raster.grid(texts)
    if at is not None:
        raster.cursor(round((at - x0) / (x1 - x0) * (columns - 1)))
    placed = {row: (f"  {cut(text, right - 2)}", ink) for row, text, ink in labels}
    lines = []
    for row in range(rows):
        text, ink = placed.get(row, ("", NO_INK))
        tick = texts.get(row, "").rjust(left - 1) + ("┤" if row in texts else "│")
        lines.append([(tick, AXIS, False), *raster.spans(row), (set_cell_size(text, right), ink, False)])
    return Drawing(lines + _x_axis(x0, x1, left, columns, right, below), left, columns, x0, x1)


def value_at(curve: Curve, x: float) -> float:
    """The mean of a curve at its point nearest to x; NaN without points."""
    if not len(curve.x_N):
        return math.nan
    right = min(int(np.searchsorted(curve.x_N, x)), len(curve.x_N) - 1)
    left = max(right - 1, 0)
    return float(curve.y_3N[0][left if x - curve.x_N[left] < curve.x_N[right] - x else right])


@dataclass(frozen=True)
class _Axis:
    """The vertical axis."""

    low: float
    high: float
    log: bool

    def dots(self, y: Floats, dots: int) -> Floats:
        """Vertical positions in dots, 0 at the top."""
        low, high, value = self.low, self.high, y
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high, value = math.log10(low), math.log10(high), np.log10(np.where(y > 0, y, np.nan))
        return (high - value) / (high - low) * (dots - 1)

    def row(self, value: float, rows: int) -> int:
        """The row of characters of a value."""
        place = self.dots(np.array([value]), rows * 4)[0]
        return min(max(int(np.rint(place)) // 4, 0), rows - 1) if np.isfinite(place) else rows - 1


class _Raster:
    """Characters and their inks."""

    def __init__(self, rows: int, columns: int) -> None:
        self._bits = np.zeros((rows, columns), np.uint8)
        self._ink = np.full((rows, columns), NO_INK, np.int16)
        self._faint = np.zeros((rows, columns), bool)
        self._over: dict[tuple[int, int], str] = {}

    def line(
        self,
        x: Floats,
        y: Floats,
        axis: _Axis,
        x0: float,
        x1: float,
        ink: int,
        *,
        faint: bool = False,
        marks: bool = False,
    ) -> None:
        """A line through points; a NaN breaks it. marks: a diamond at every point as well."""
        rows, columns = self._bits.shape
        row, column = axis.dots(y, rows * 4), (x - x0) / (x1 - x0) * (columns * 2 - 1)
        dot_row, dot_column = _joined(row, column)
        r, c = _inside(dot_row, dot_column, rows * 4, columns * 2)
        if not faint:  # a line over a faint one stays thin
            covered = self._faint[r // 4, c // 2]
            self._bits[r[covered] // 4, c[covered] // 2] = 0
        np.bitwise_or.at(self._bits, (r // 4, c // 2), _DOTS[r % 4, c % 2])
        self._ink[r // 4, c // 2], self._faint[r // 4, c // 2] = ink, faint
        if marks and len(x) <= columns // 3:
            r, c = _inside(row, column, rows * 4, columns * 2)
            self._over |= dict.fromkeys(zip((r // 4).tolist(), (c // 2).tolist(), strict=True), "◆")

    def grid(self, rows: Iterable[int]) -> None:
        """Dotted lines where nothing else is."""
        for row in rows:
            empty = (self._bits[row] == 0) & (self._ink[row] == NO_INK)
            self._ink[row, empty] = GRID

    def cursor(self, column: int) -> None:
        """A vertical line where no curve is."""
        self._ink[self._bits[:, column] == 0, column] = CURSOR

    def spans(self, row: int) -> list[Span]:
        """One row as runs of equal style."""
        bits, ink, faint = self._bits[row], self._ink[row], self._faint[row]
        chars = np.where(bits > 0, (bits.astype(np.uint32) + 0x2800).view("<U1"), " ")
        chars[(bits == 0) & (ink == GRID)] = "┈"
        chars[(bits == 0) & (ink == CURSOR)] = "│"
        for (r, c), mark in self._over.items():
            if r == row:
                chars[c] = mark
        breaks = np.flatnonzero((np.diff(ink) != 0) | (np.diff(faint.astype(np.int8)) != 0)) + 1
        edges = [0, *breaks.tolist(), len(ink)]
        return [("".join(chars[a:b]), int(ink[a]), bool(faint[a])) for a, b in pairwise(edges)]


def _visible(curve: Curve, x0: float, x1: float, bins: int) -> Curve:
    """The part between x0 and x1 with one point more on either side, in at most `bins` points."""
    first, last = np.searchsorted(curve.x_N, x0, "left"), np.searchsorted(curve.x_N, x1, "right")
    part = slice(max(0, int(first) - 1), int(last) + 1)
    x_N, y_3N = downsampled(curve.x_N[part], curve.y_3N[:, part], bins)
    return replace(curve, x_N=x_N, y_3N=y_3N)


def _smooth(y_3N: Floats) -> Floats:
    """Centered moving mean, shorter at the ends; NaN stays NaN and counts for nothing."""
    y_N = y_3N[0]
    half = max(2, len(y_N) // _SMOOTHED_SHARE // 2)
    if len(y_N) < 8 * half:
        return y_3N
    known = np.isfinite(y_N)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, y_N, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    at = np.arange(len(y_N))
    reach = np.minimum(half, np.minimum(at, len(y_N) - 1 - at))  # symmetric, or the ends would be biased
    low, high = at - reach, at + reach + 1
    mean = np.where(known, (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1), np.nan)
    return np.stack([mean, y_3N[1], y_3N[2]])


def _vertical(curves: Sequence[Curve], x0: float, x1: float, log: bool, floor: float | None) -> _Axis | None:
    """The axis that holds every visible value; None without any."""
    inside = [c.y_3N[1:, (c.x_N >= x0) & (c.x_N <= x1)].ravel() for c in curves]
    values = np.concatenate(inside)
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if log:
        margin = max(math.log10(high / low) * 0.04, 0.01)
        return _Axis(low / 10**margin, high * 10**margin, True)
    low = low if floor is None else min(floor, low)
    margin = max((high - low) * 0.04, abs(high) * 1e-3, 1e-9)
    return _Axis(low - (margin if floor is None else 0.0), high + margin, False)


def _joined(row: Floats, column: Floats) -> tuple[Floats, Floats]:
    """The points, and others on straight lines between neighbors, close enough that no dot is left out."""
    if len(row) < 2:
        return row, column
    reach = np.maximum(np.abs(np.diff(row)), np.abs(np.diff(column)))
    known = np.isfinite(reach)
    # A line to a point far outside the picture needs no more dots than the picture has.
    number_ = np.where(known, np.ceil(np.minimum(np.where(known, reach, 0), 4096)), 0).astype(int) + 1
    start = np.repeat(np.cumsum(number_) - number_, number_)
    share = (np.arange(number_.sum()) - start) / np.repeat(np.maximum(number_ - 1, 1), number_)
    at = np.repeat(np.arange(len(row) - 1), number_)
    between = row[at] + share * np.diff(row)[at], column[at] + share * np.diff(column)[at]
    return np.concatenate([row, between[0]]), np.concatenate([column, between[1]])


def _inside(row: Floats, column: Floats, rows: int, columns: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Dots within the raster."""
    inside = np.isfinite(row) & np.isfinite(column)
    inside &= (row > -0.5) & (row < rows - 0.5) & (column > -0.5) & (column < columns - 0.5)
    return np.rint(row[inside]).astype(np.intp), np.rint(column[inside]).astype(np.intp)


def _labels(curves: Sequence[Curve], at: float | None, axis: _Axis, rows: int) -> list[tuple[int, str, int]]:
    """(row, text, ink): each curve's name with its value, beside that value, moved apart where they collide."""
    wanted = []
    for ink, curve in enumerate(curves):
        finite = curve.y_3N[0][np.isfinite(curve.y_3N[0])]
        if len(finite):
            value = float(finite[-1]) if at is None else value_at(curve, at)
            name = f"{curve.name} " if curve.name else ""
            wanted.append((axis.row(value, rows), -value, f"{name}{label(value)}", ink))
    wanted = sorted(wanted[:rows])
    placed = [row for row, *_ in wanted]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + 1)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], rows - len(placed) + i)
    return [(row, text, ink) for row, (_, _, text, ink) in zip(placed, wanted, strict=True)]


def _x_axis(x0: float, x1: float, left: int, columns: int, right: int, below: int) -> list[list[Span]]:
    rule, text, free = ["─"] * columns, [" "] * (left + columns + right), 0
    most = min(max(2, columns // _COLUMNS_PER_TICK), max(1, int(x1 - x0)))  # there is nothing between two steps
    for tick in linear_ticks(x0, x1, most):
        at = round((tick - x0) / (x1 - x0) * (columns - 1))
        rule[at] = "┬"
        name = count(tick)
        start = min(max(left + at - len(name) // 2, 0), left + columns - len(name))
        if start >= free:
            text[start : start + len(name)] = name
            free = start + len(name) + 1
    labels: list[Span] = [("".join(text), AXIS, False)]
    if below == 1:
        return [labels]
    return [[(" " * (left - 1) + "└" + "".join(rule) + " " * right, AXIS, False)], labels]


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high], with at most `most` gaps between; where
    fewer than two of them lie within, closer ones with up to twice as many gaps."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or most < 1:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = [power * factor for factor in (1, 2, 5, 10, 20)]
    chosen = next(index for index, step in enumerate(steps) if (high - low) / step <= most)
    found = _multiples(steps[chosen], low, high)
    closer = _multiples(steps[chosen - 1], low, high) if len(found) < 2 and chosen > 0 else []
    return closer if len(found) < len(closer) <= 2 * most + 1 else found


def _multiples(step: float, low: float, high: float) -> list[float]:
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them where there is room; linear ones in a narrow range."""
    if not 0 < low < high or most < 1:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if 2 <= len(found) <= most:
            return found
    if high / low < 10:
        return linear_ticks(low, high, most)
    powers = [10.0**d for d in decades if low <= 10.0**d <= high]
    return powers[:: math.ceil(len(powers) / most)]


def tick_label(value: float, step: float) -> str:
    """A tick's value with the digits that tell it from its neighbors, `step` away; powers for huge and tiny ones."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:.{min(digits, 6)}f}"
