"""A chart as lines of styled characters: the raster, its axes, and every trace's name and last value at its end.

Pure; a line is a list of (text, ink, faint), and the widget turns inks into colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from affmae_cli.dashboard.plot import NO_INK, Raster, Trace, View, draw
from affmae_cli.dashboard.ticks import count_label, linear_ticks, log_ticks, tick_label
from affmae_engine.runtime.formatting import number

AXIS_INK = -3
Span = tuple[str, int, bool]
Line = list[Span]

_ROWS_PER_TICK = 3
_COLUMNS_PER_TICK = 9
_MOST_LABEL = 22


@dataclass(frozen=True)
class Frame:
    """A drawn chart. left: columns before the plot; columns: of the plot; view: what it shows."""

    lines: list[Line]
    left: int
    columns: int
    view: View

    def x_at(self, column: int) -> float | None:
        """The x of a column of the whole chart; None beside the plot."""
        at = column - self.left
        if not 0 <= at < self.columns:
            return None
        return self.view.x0 + at / max(self.columns - 1, 1) * (self.view.x1 - self.view.x0)


def draw_frame(traces: Sequence[Trace], view: View, width: int, height: int) -> Frame:
    """A chart of exactly `height` lines of `width` columns.

    Args:
        traces: in drawing order; those that are not faint are named at their right ends when there are several.
        view: what part is drawn.
        width, height: columns and rows for everything; too small ones give blank lines.
    """
    below = 2 if height >= 9 else 1
    rows = height - below
    ticks = (log_ticks if view.log else linear_ticks)(view.y0, view.y1, max(2, rows // _ROWS_PER_TICK))
    step = min((b - a for a, b in pairwise(ticks)), default=0.0)
    texts = {view_row(view, tick, rows): tick_label(tick, step) for tick in ticks}
    named = [trace for trace in traces if not trace.faint and len(trace.x)]
    labels = _end_labels(named, view, rows) if len(named) > 1 else {}
    left = max((len(text) for text in texts.values()), default=0) + 1
    right = min(max((len(text) + 1 for text, _ in labels.values()), default=0), _MOST_LABEL)
    columns = width - left - right
    if rows < 2 or columns < 8:
        return Frame([[(" " * width, NO_INK, False)] for _ in range(height)], 0, 0, view)
    raster = draw(traces, view, columns, rows, ticks)
    lines = [
        [
            (texts.get(row, "").rjust(left - 1) + ("┤" if row in texts else "│"), AXIS_INK, False),
            *raster_line(raster, row),
            *_padded(labels.get(row), right),
        ]
        for row in range(rows)
    ]
    return Frame(lines + _x_axis(view, left, columns, right, below), left, columns, view)


def view_row(view: View, value: float, rows: int) -> int:
    """The character row of a value."""
    return int(np.rint(view.rows(np.array([value]), rows * 4)[0])) // 4


def raster_line(raster: Raster, row: int) -> Line:
    """One row of a raster as runs of equal style."""
    ink, faint = raster.ink[row], raster.faint[row]
    breaks = np.flatnonzero((np.diff(ink) != 0) | (np.diff(faint.astype(np.int8)) != 0)) + 1
    edges = [0, *breaks.tolist(), len(ink)]
    return [("".join(raster.chars[row, a:b]), int(ink[a]), bool(faint[a])) for a, b in pairwise(edges)]


def _end_labels(traces: Sequence[Trace], view: View, rows: int) -> dict[int, tuple[str, int]]:
    """Row -> (text, ink): each trace's name and last visible value beside its end, moved apart where they collide."""
    wanted = []
    for trace in traces:
        seen = (trace.x >= view.x0) & (trace.x <= view.x1) & np.isfinite(trace.y)
        if seen.any():
            value = float(trace.y[seen][-1])
            row = min(max(view_row(view, value, rows), 0), rows - 1) if not view.log or value > 0 else rows - 1
            text = f"{trace.name} {number(value)}"
            text = text if len(text) < _MOST_LABEL else f"{text[: _MOST_LABEL - 2]}…"
            wanted.append((row, -value, text, trace.ink))
    wanted = sorted(wanted[:rows])
    placed = [row for row, *_ in wanted]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + 1)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], rows - len(placed) + i)
    return {row: (text, ink) for row, (_, _, text, ink) in zip(placed, wanted, strict=True)}


def _padded(label: tuple[str, int] | None, width: int) -> Line:
    if not width:
        return []
    if label is None:
        return [(" " * width, NO_INK, False)]
    return [(f" {label[0]}".ljust(width), label[1], False)]


def _x_axis(view: View, left: int, columns: int, right: int, below: int) -> list[Line]:
    rule = ["─"] * columns
    text = [" "] * (left + columns + right)
    free = 0
    most = min(max(2, columns // _COLUMNS_PER_TICK), int(view.x1 - view.x0))  # there is nothing between two steps
    for tick in linear_ticks(view.x0, view.x1, most):
        at = int(np.rint(view.columns(np.array([tick]), columns * 2)[0])) // 2
        rule[at] = "┬"
        label = count_label(tick)
        start = min(max(left + at - len(label) // 2, 0), left + columns - len(label))
        if start >= free:
            text[start : start + len(label)] = label
            free = start + len(label) + 1
    labels: Line = [("".join(text), AXIS_INK, False)]
    if below == 1:
        return [labels]
    return [[(" " * (left - 1) + "└" + "".join(rule) + " " * right, AXIS_INK, False)], labels]
