"""The table of runs: its columns, how a row is written, how rows are ordered. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.runs import RunRow
from affmae_cli.dashboard.signs import SIGNS
from affmae_cli.dashboard.ticks import count_label
from affmae_engine.runtime.formatting import duration, number, rate


@dataclass(frozen=True)
class Column:
    """title: of the column; text: of a cell; key: what orders rows, low values first; right: numbers align right."""

    title: str
    text: Callable[[RunRow], str]
    key: Callable[[RunRow], Any]
    right: bool = False


def _steps(row: RunRow) -> str:
    return f"{row.step:,} of {row.total_steps:,}" if row.total_steps else f"{row.step:,}"


def _short_steps(row: RunRow) -> str:
    return f"{count_label(row.step)}/{count_label(row.total_steps)}" if row.total_steps else count_label(row.step)


def _known(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else "-"


def _last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


COLUMNS = (
    Column("state", lambda row: f"{SIGNS[row.status.kind]} {row.status.kind}", lambda row: row.status.kind),
    Column("run", lambda row: one_line(row.name), lambda row: row.name),
    Column("task", lambda row: one_line(row.task) or "-", lambda row: row.task),
    Column("step", _steps, lambda row: -row.step, right=True),
    Column("loss", lambda row: _known(row.loss, number), lambda row: _last(row.loss), right=True),
    Column("best", lambda row: _known(row.best, number), lambda row: _last(row.best), right=True),
    Column("img/s", lambda row: _known(row.images_per_s, rate), lambda row: -_last(-row.images_per_s), right=True),
    Column("age", lambda row: duration(row.age_s), lambda row: -row.last_time, right=True),
)

_TITLES = [column.title for column in COLUMNS]
NAME, _STEP = _TITLES.index("run"), _TITLES.index("step")
"""NAME: the column that is cut where the room is too small."""
_SHORTEST_NAME = 12


def ordered(rows: Sequence[RunRow], column: int, *, reverse: bool = False) -> list[RunRow]:
    """Rows by a column; equal ones by their newest event."""
    newest = sorted(rows, key=lambda row: -row.last_time)
    return sorted(newest, key=COLUMNS[column].key, reverse=reverse)


def fitted(rows: Sequence[RunRow], room: int, padding: int) -> tuple[list[tuple[str, ...]], list[int]]:
    """The text of every cell, row by row, and the width of every column, see `widths`.

    Where not everything fits, steps are written short, so that no column is out of sight even in 80 columns.
    """
    texts = [tuple(column.text(row) for column in COLUMNS) for row in rows]
    wide = widths(texts, room, padding)
    if sum(wide) + padding * len(wide) > room:
        texts = [(*text[:_STEP], _short_steps(row), *text[_STEP + 1 :]) for row, text in zip(rows, texts, strict=True)]
        wide = widths(texts, room, padding)
    return texts, wide


def widths(texts: Sequence[Sequence[str]], room: int, padding: int) -> list[int]:
    """Cells that every column gets: what it holds; where the room is too small for that, the name gets less.

    Args:
        texts: of every cell, row by row.
        room: cells for all columns with their padding.
        padding: cells between two columns.
    """
    wanted = [max(map(cell_len, column)) for column in zip(_TITLES, *texts, strict=True)]
    missing = sum(wanted) + padding * len(wanted) - room
    wanted[NAME] = max(min(wanted[NAME], _SHORTEST_NAME), wanted[NAME] - max(0, missing))
    return wanted
