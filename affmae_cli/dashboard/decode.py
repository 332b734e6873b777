"""Lines of metrics.jsonl as events, fast enough for a million of them.

Almost every line of a long run is a `step` or a `system`. Those are decoded by the chunk, straight into the few fields
that are drawn, and handed on as columns; every other line becomes its event. A chunk with a line that is damaged or of
an unknown kind is decoded line by line, so that only that line is lost.

Axes: N lines of one batch.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Union, get_type_hints

import msgspec
import numpy as np

from affmae_engine.events import EVENTS, Event, RunStarted, StepLogged, SystemSampled, from_line

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


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Known = float | None
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
"""Seconds since 1970, within what calendars can show."""
_IN_JSON: dict[Any, Any] = {
    int: _Count,
    float: _Known,
    list[float]: list[_Known],
    dict[str, float]: dict[str, _Known],
    dict[str, dict[str, float]]: dict[str, dict[str, _Known]],
}
"""What stands in a line for a field of an event: numbers that are not finite are null."""


def _rare(event: type[Event]) -> type[msgspec.Struct]:
    # Its values are not used, it only proves that the line is what it says; the line is then read as an event.
    hints = get_type_hints(event)
    types = {name: _IN_JSON.get(hint, hint) for name, hint in hints.items()} | {"time": _Time}
    known = [(f.name, types[f.name], f) for f in fields(event)]
    wanted = [(name, kind) for name, kind, f in known if f.default is MISSING and f.default_factory is MISSING]
    others = [(name, kind, None) for name, kind, f in known if (name, kind) not in wanted]
    return msgspec.defstruct(f"_{event.kind}", [*wanted, *others], tag_field="kind", tag=event.kind, gc=False)


_Step = msgspec.defstruct(
    "_Step",
    [("step", _Count), ("losses", dict[str, _Known]), *((name, _Known, None) for name in STEP_COLUMNS)],
    tag_field="kind",
    tag=StepLogged.kind,
    gc=False,
)
_System = msgspec.defstruct(
    "_System",
    [("time", _Time), *((name, _Known, None) for name in SYSTEM_COLUMNS)],
    tag_field="kind",
    tag=SystemSampled.kind,
    gc=False,
)
_Started = _rare(RunStarted)
_RARE = (
    _Started,
    *(_rare(event) for event in EVENTS.values() if event not in (StepLogged, SystemSampled, RunStarted)),
)
_whole: dict[Any, msgspec.json.Decoder[Any]] = {
    _Step: msgspec.json.Decoder(_rare(StepLogged)),
    _System: msgspec.json.Decoder(_rare(SystemSampled)),
}
"""For the newest line of each kind, which is shown whole, what is not drawn over the run included."""
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Union[_Step, _System, *_RARE])
_step_values, _system_values = operator.attrgetter(*STEP_COLUMNS), operator.attrgetter(*SYSTEM_COLUMNS)


def decode(data: bytes, offset: int = 0) -> Iterator[Segment]:
    """Whole lines in the order in which trainer processes wrote them.

    Args:
        data: lines, each with its line end.
        offset: where in the file `data` begins.
    """
    edge_N = np.concatenate([[0], np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1])
    try:
        lines: list[Any] = _decoder.decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        lines = []
    if len(lines) != len(edge_N) - 1:
        edges = edge_N.tolist()
        lines = [_decoded(data[start:end]) for start, end in itertools.pairwise(edges)]
    starts = [index for index, line in enumerate(lines) if type(line) is _Started]
    begins = [0, *starts] if starts[:1] != [0] else starts
    for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        if begin < end:
            yield _segment(data, lines[begin:end], edge_N[begin : end + 1], offset)


def _segment(data: bytes, lines: Sequence[Any], edge_N: np.ndarray, offset: int) -> Segment:
    def event(index: int) -> Event | None:
        line = data[edge_N[index] : edge_N[index + 1]]
        with contextlib.suppress(UnicodeDecodeError, msgspec.MsgspecError):
            if type(lines[index]) in _whole:
                _whole[type(lines[index])].decode(line)
            return from_line(line.decode("utf-8"))
        return None

    segment = Segment()
    chosen = [index for index, line in enumerate(lines) if type(line) is _Step]
    last = next((found for index in reversed(chosen) if (found := event(index)) is not None), None)
    if isinstance(last, StepLogged):
        steps = lines if len(chosen) == len(lines) else [lines[index] for index in chosen]
        segment.steps = _step_batch(steps, edge_N[chosen] + offset, last)
    if len(chosen) == len(lines):
        return segment
    chosen = [index for index, line in enumerate(lines) if type(line) is _System]
    last = next((found for index in reversed(chosen) if (found := event(index)) is not None), None)
    if isinstance(last, SystemSampled):
        systems = [lines[index] for index in chosen]
        time_N = np.array([line.time for line in systems])
        segment.systems = SystemBatch(time_N, _columns(SYSTEM_COLUMNS, map(_system_values, systems)), last)
    rare = [index for index, line in enumerate(lines) if isinstance(line, _RARE)]
    segment.events = [found for index in rare if (found := event(index)) is not None]
    if segment.events and isinstance(segment.events[0], RunStarted):
        segment.started = segment.events[0]
    return segment


def _step_batch(lines: Sequence[Any], offset_N: np.ndarray, last: StepLogged) -> StepBatch:
    columns = _columns(STEP_COLUMNS, map(_step_values, lines))
    losses = [line.losses for line in lines]
    names = list({**losses[0], **losses[-1]})
    prefixed = [LOSS_PREFIX + name for name in names]
    if len(names) > 1 and losses[0].keys() == losses[-1].keys():
        with contextlib.suppress(KeyError):  # the usual case: every line has the same losses
            columns |= _columns(prefixed, map(operator.itemgetter(*names), losses))
            names = []
    for name in names:
        columns |= _columns([LOSS_PREFIX + name], ((found.get(name),) for found in losses))
    return StepBatch(np.array([line.step for line in lines], np.int64), offset_N, columns, last)


def _columns(names: Sequence[str], rows: Iterable[tuple[float | None, ...]]) -> dict[str, np.ndarray]:
    values = np.array(list(rows), np.float64)
    values[np.abs(values) > _LARGEST] = np.nan  # a diverged loss may be more than float32 holds
    return dict(zip(names, values.astype(np.float32).T, strict=True))


def _decoded(line: bytes) -> Any:
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
