"""Lines of metrics.jsonl as events, fast enough for a million of them.

Almost every line of a long run is a `step` or a `system`. Those are handed on as columns of the few fields that are
drawn, and the newest of them whole; every other line as its event.

Axes: N lines of one batch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from affmae_engine.events import Event, RunStarted, StepLogged, SystemSampled, from_lines

STEP_COLUMNS = ("lr", "grad_norm", "images_per_s", "data_wait", "step_s", "memory_gib")
"""Fields of a `step` line that are drawn over the run, besides its losses."""
LOSS_PREFIX = "losses."
"""Before a loss's name in the columns of a batch: `losses.loss` is the total."""
SYSTEM_COLUMNS = (
    "gpu_memory_used", "gpu_memory_others", "gpu_utilisation", "power", "temperature", "sm_clock", "memory_clock",
    "host_memory_used", "process_memory", "cpu",
)  # fmt: skip
"""Fields of a `system` line that are drawn over time."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class StepBatch:
    """`step` lines as columns.

    step_N: int64. offset_N: int64, byte offset of each line. columns: float32 [N] by name, NaN where a line has no
    such value. last: the newest line whole.
    """

    step_N: np.ndarray
    offset_N: np.ndarray
    columns: dict[str, np.ndarray]
    last: StepLogged


@dataclass(frozen=True)
class SystemBatch:
    """`system` lines as columns. time_N: float64, seconds since 1970. columns and last: as in a `StepBatch`."""

    time_N: np.ndarray
    columns: dict[str, np.ndarray]
    last: SystemSampled


@dataclass
class Segment:
    """Lines of one trainer process: what it says first (if it is among them), its steps, its samples of the machine,
    and every other event in order. How steps and events were interleaved is told by their `step` and `time`."""

    started: RunStarted | None = None
    steps: StepBatch | None = None
    systems: SystemBatch | None = None
    events: list[Event] = field(default_factory=list)


_step_values, _system_values = operator.attrgetter(*STEP_COLUMNS), operator.attrgetter(*SYSTEM_COLUMNS)


def decode(data: bytes, offset: int = 0) -> Iterator[Segment]:
    """Whole lines in the order in which trainer processes wrote them.

    Args:
        data: lines, each with its line end.
        offset: where in the file `data` begins.
    """
    edge_N = np.concatenate([[0], np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1])
    events = from_lines(data)
    starts = [index for index, event in enumerate(events) if type(event) is RunStarted]
    begins = [0, *starts] if starts[:1] != [0] else starts
    for begin, end in itertools.pairwise([*begins, len(events)]):
        if begin < end:
            yield _segment(events[begin:end], edge_N[begin:end] + offset)


def _segment(events: Sequence[Event | None], offset_N: np.ndarray) -> Segment:
    segment = Segment()
    chosen = [index for index, event in enumerate(events) if type(event) is StepLogged]
    if chosen:
        steps = events if len(chosen) == len(events) else [events[index] for index in chosen]
        segment.steps = _step_batch(cast(Sequence[StepLogged], steps), offset_N[chosen])
    if len(chosen) == len(events):
        return segment
    systems = [event for event in events if type(event) is SystemSampled]
    if systems:
        time_N = np.array([event.time for event in systems])
        segment.systems = SystemBatch(time_N, _columns(SYSTEM_COLUMNS, map(_system_values, systems)), systems[-1])
    segment.events = [event for event in events if not isinstance(event, StepLogged | SystemSampled | None)]
    if segment.events and isinstance(segment.events[0], RunStarted):
        segment.started = segment.events[0]
    return segment


def _step_batch(lines: Sequence[StepLogged], offset_N: np.ndarray) -> StepBatch:
    columns = _columns(STEP_COLUMNS, map(_step_values, lines))
    losses = [line.losses for line in lines]
    names = list({**losses[0], **losses[-1]})
    prefixed = [LOSS_PREFIX + name for name in names]
    if len(names) > 1 and losses[0].keys() == losses[-1].keys():
        with contextlib.suppress(KeyError):  # the usual case: every line has the same losses
            columns |= _columns(prefixed, map(operator.itemgetter(*names), losses))
            names = []
    for name in names:
        columns |= _columns([LOSS_PREFIX + name], ((found.get(name, math.nan),) for found in losses))
    return StepBatch(np.array([line.step for line in lines], np.int64), offset_N, columns, lines[-1])


def _columns(names: Sequence[str], rows: Iterable[tuple[float, ...]]) -> dict[str, np.ndarray]:
    values = np.array(list(rows), np.float64)
    values[np.abs(values) > _LARGEST] = np.nan  # a diverged loss may be more than float32 holds
    return dict(zip(names, values.astype(np.float32).T, strict=True))
