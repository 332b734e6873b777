"""Curves as characters: a braille raster with axes, pure numpy, no Textual.

A character cell is 2 x 4 dots. A cell takes the ink of the last trace that touched it, so the trace that matters most
is drawn last. Points outside the view are cut off; a NaN breaks a line. Traces are told apart by their names, written
at their ends, and not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.uint8)  # bits by (row, column) in a cell
_BRAILLE = 0x2800
SMOOTHED_SHARE = 40
"""The moving mean of a smoothed trace spans this fraction of the visible points."""
MARK = "◆"
GRID = "┈"
NO_INK, GRID_INK = -1, -2


@dataclass(frozen=True, eq=False)
class Trace:
    """One named line, x ascending. ink: which colour of the palette; marks: single points, not joined; faint: dimmed.

    low, high: extremes of the values that each y is the mean of, where a point stands for several.
    """

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    ink: int = 0
    marks: bool = False
    faint: bool = False


@dataclass(frozen=True)
class View:
    """What part of the plane is drawn, and whether its height is logarithmic."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False

    def columns(self, x: Floats, dots: int) -> Floats:
        """Horizontal positions in dots, 0 at the left edge."""
        return (x - self.x0) / (self.x1 - self.x0) * (dots - 1)

    def rows(self, y: Floats, dots: int) -> Floats:
        """Vertical positions in dots, 0 at the top edge."""
        low, high, value = self.y0, self.y1, y
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high, value = math.log10(low), math.log10(high), np.log10(np.where(y > 0, y, np.nan))
        return (high - value) / (high - low) * (dots - 1)


@dataclass(frozen=True)
class Raster:
    """Characters [row, column] and for each the ink of its trace (or NO_INK, GRID_INK); `faint` cells are dimmed."""

    chars: NDArray[np.str_]
    ink: NDArray[np.int16]
    faint: NDArray[np.bool_]


def visible(trace: Trace, x0: float, x1: float) -> Trace:
    """The part of a trace between x0 and x1, with one point more on either side so that lines reach the edge."""
    first, last = np.searchsorted(trace.x, (x0, x1), side="left")
    first, last = max(0, int(first) - 1), min(len(trace.x), int(last) + 1)
    low, high = (None if side is None else side[first:last] for side in (trace.low, trace.high))
    return replace(trace, x=trace.x[first:last], y=trace.y[first:last], low=low, high=high)


def raw(trace: Trace) -> Trace:
    """The same line through both extremes of every point, so that no spike is lost."""
    if trace.low is None or trace.high is None:
        return trace
    return replace(
        trace, x=np.repeat(trace.x, 2), y=np.stack([trace.low, trace.high], axis=1).ravel(), low=None, high=None
    )


def value_at(trace: Trace, x: float) -> float:
    """The trace's value at its point nearest to x; NaN without points."""
    if not len(trace.x):
        return math.nan
    right = min(int(np.searchsorted(trace.x, x)), len(trace.x) - 1)
    left = max(right - 1, 0)
    return float(trace.y[left if x - trace.x[left] < trace.x[right] - x else right])


def smooth(y: Floats, width: int) -> Floats:
    """Centred moving mean over `width` points, shorter at the ends; NaN stays NaN and counts for nothing."""
    if width < 2 or len(y) < 3:
        return y
    half = width // 2
    known = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    at = np.arange(len(y))
    reach = np.minimum(half, np.minimum(at, len(y) - 1 - at))  # symmetric, or the ends would be biased
    low, high = at - reach, at + reach + 1
    with np.errstate(invalid="ignore"):
        return np.where(known, (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1), np.nan)


def fitting_view(
    traces: Sequence[Trace], x0: float, x1: float, *, log: bool, floor: float | None = None
) -> View | None:
    """The view from x0 to x1 whose height holds every visible point; None when there is none to show.

    Args:
        traces: what is drawn.
        x0, x1: horizontal range.
        log: logarithmic height; values that are not positive are left out.
        floor: lowest end of the height, if it is fixed.
    """
    values = np.concatenate([c.y[(c.x >= x0) & (c.x <= x1)] for c in traces] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    low = low if floor is None or log else floor
    if log:
        margin = max(math.log10(high / low) * 0.04, 0.01)
        return View(x0, max(x1, x0 + 1), low / 10**margin, high * 10**margin, True)
    margin = max((high - low) * 0.04, abs(high) * 1e-3, 1e-12)
    return View(x0, max(x1, x0 + 1), low - (margin if floor is None else 0.0), high + margin)


def draw(traces: Sequence[Trace], view: View, columns: int, rows: int, grid: Sequence[float] = ()) -> Raster:
    """Draw traces in order, later ones on top, over horizontal lines at the values `grid`."""
    bits = np.zeros((rows, columns), np.uint8)
    ink = np.full((rows, columns), NO_INK, np.int16)
    faint = np.zeros((rows, columns), bool)
    marks: list[tuple[int, int]] = []
    for trace in traces:
        row, column = view.rows(trace.y, rows * 4), view.columns(trace.x, columns * 2)
        if not trace.marks:
            row, column = _joined(row, column)
        inside = np.isfinite(row) & np.isfinite(column)
        inside &= (row > -0.5) & (row < rows * 4 - 0.5) & (column > -0.5) & (column < columns * 2 - 0.5)
        r, c = np.rint(row[inside]).astype(int), np.rint(column[inside]).astype(int)
        if not trace.faint:  # a line over a faint one stays thin
            covered = faint[r // 4, c // 2]
            bits[r[covered] // 4, c[covered] // 2] = 0
        np.bitwise_or.at(bits, (r // 4, c // 2), _DOTS[r % 4, c % 2])
        ink[r // 4, c // 2] = trace.ink
        faint[r // 4, c // 2] = trace.faint
        if trace.marks:
            marks += zip((r // 4).tolist(), (c // 2).tolist(), strict=True)
    chars = np.where(bits > 0, (bits.astype(np.uint32) + _BRAILLE).view("<U1"), " ")
    for value in grid:
        at = int(np.rint(view.rows(np.array([value]), rows * 4)[0])) // 4
        if 0 <= at < rows:
            empty = chars[at] == " "
            chars[at, empty], ink[at, empty] = GRID, GRID_INK
    for r_, c_ in marks:
        chars[r_, c_] = MARK
    return Raster(chars, ink, faint)


def _joined(row: Floats, column: Floats) -> tuple[Floats, Floats]:
    """The points, and others on straight lines between neighbours, close enough that no dot is left out."""
    if len(row) < 2:
        return row, column
    reach = np.maximum(np.abs(np.diff(row)), np.abs(np.diff(column)))
    known = np.isfinite(reach)
    # A line to a point far outside the picture needs no more dots than the picture has.
    count = np.where(known, np.ceil(np.minimum(reach, 4096)), 1).astype(int) + 1
    start = np.repeat(np.cumsum(count) - count, count)
    share = (np.arange(count.sum()) - start) / np.repeat(np.maximum(count - 1, 1), count)
    at = np.repeat(np.arange(len(row) - 1), count)
    between = row[at] + share * np.diff(row)[at], column[at] + share * np.diff(column)[at]
    return np.concatenate([row, between[0]]), np.concatenate([column, between[1]])


def layers(traces: Sequence[Trace], x0: float, x1: float, *, smoothing: bool) -> list[Trace]:
    """The visible part of traces in drawing order, the first one last, so on top; smoothed ones over faint raw ones."""
    seen = [visible(trace, x0, x1) for trace in reversed(traces)]
    lines = [raw(trace) for trace in seen if not trace.marks]
    marks = [trace for trace in seen if trace.marks]
    if not smoothing:
        return [*lines, *marks]
    means = [replace(t, y=smooth(t.y, len(t.y) // SMOOTHED_SHARE)) for t in seen if not t.marks]
    return [*(replace(line, faint=True) for line in lines), *means, *marks]
