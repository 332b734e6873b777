"""Lines of metrics.jsonl as events, fast enough for a million of them.

Almost every line of a long run is a `step`. Those are decoded by the chunk, straight into the few fields that are
drawn, and handed on as columns; every other line becomes its event. A chunk with a damaged line is decoded line by
line, so that only the damage is lost.

Axes: N lines of one batch.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import msgspec
import numpy as np

from affmae_engine.events import Event, StepLogged, from_line

COLUMNS = ("lr", "grad_norm", "images_per_s", "data_wait", "step_s", "memory_gib")
"""Fields of a `step` line that are drawn over the run, besides its losses."""
LOSS_PREFIX = "losses."
"""Before a loss's name in the columns of a batch: `losses.loss` is the total."""


@dataclass(frozen=True)
class StepBatch:
    """Consecutive `step` lines as columns.

    step_N: int64. offset_N: int64, byte offset of each line. columns: float32 [N] by name, NaN where a line has no
    such value. last: the newest line whole.
    """

    step_N: np.ndarray
    offset_N: np.ndarray
    columns: dict[str, np.ndarray]
    last: StepLogged


class _Line(msgspec.Struct, gc=False):
    # Of any kind: what is not a step has none of the other fields, and is read again as what it is.
    kind: str
    step: int = -1
    time: float = 0.0
    losses: dict[str, float | None] | None = None
    lr: float | None = None
    grad_norm: float | None = None
    images_per_s: float | None = None
    data_wait: float | None = None
    step_s: float | None = None
    memory_gib: float | None = None


_decoder = msgspec.json.Decoder(_Line)
_values = operator.attrgetter(*COLUMNS)


def decode(data: bytes, offset: int = 0) -> Iterator[StepBatch | Event]:
    """Whole lines in the order in which they were written.

    Args:
        data: lines, each with its line end.
        offset: where in the file `data` begins.
    """
    ends_N = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    starts_N = np.concatenate([[0], ends_N])[:-1]
    try:
        lines: list[_Line | None] = list(_decoder.decode_lines(data))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        lines = []
    if len(lines) != len(ends_N):
        lines = [_decoded(data[start:end]) for start, end in zip(starts_N, ends_N, strict=True)]
    first = 0
    for is_step, group in groupby(lines, key=lambda line: line is not None and line.kind == "step" and line.step >= 0):
        members = list(group)
        chosen = slice(first, first + len(members))
        first += len(members)
        texts = (data[start:end] for start, end in zip(starts_N[chosen], ends_N[chosen], strict=True))
        if not is_step:
            yield from (event for text in texts if (event := _event(text)) is not None)
            continue
        last = _event(data[starts_N[chosen][-1] : ends_N[chosen][-1]])
        if isinstance(last, StepLogged):
            yield _batch([line for line in members if line is not None], starts_N[chosen] + offset, last)


def _batch(lines: list[_Line], offset_N: np.ndarray, last: StepLogged) -> StepBatch:
    columns = dict(zip(COLUMNS, np.array(list(map(_values, lines)), np.float32).T, strict=True))
    losses = [line.losses or {} for line in lines]
    names = list({**losses[0], **losses[-1]})  # one process keeps its losses; a resumed one may have others
    if len(names) > 1 and losses[0].keys() == losses[-1].keys():
        with contextlib.suppress(KeyError):
            rows = list(map(operator.itemgetter(*names), losses))
            columns |= zip((LOSS_PREFIX + name for name in names), np.array(rows, np.float32).T, strict=True)
            names = []
    columns |= {LOSS_PREFIX + name: np.array([found.get(name) for found in losses], np.float32) for name in names}
    return StepBatch(np.array([line.step for line in lines], np.int64), offset_N, columns, last)


def _decoded(line: bytes) -> _Line | None:
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _event(line: bytes) -> Event | None:
    try:
        return from_line(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None
