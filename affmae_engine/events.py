"""What a run tells the world: one JSON object a line in `metrics.jsonl`, append-only, flushed.

The first line of a file is a `RunStarted` with the schema version. A reader must skip kinds and fields that it does
not know and a torn last line. Times are seconds since the epoch (`time`), durations come from a monotonic clock.
Lines are ordered as written; after a resume `step` may go back to the checkpoint's step: the later line wins. What was
measured beyond that checkpoint is taken out (`train.metrics.drop_superseded`).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. `time` is the wall clock in seconds since the epoch when the event was made."""

    kind: ClassVar[str]
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A trainer process began or resumed; `step` is the step it starts from."""

    kind = "run_started"
    schema: int = SCHEMA_VERSION
    task: str
    run: str
    step: int
    total_steps: int
    resumed: bool
    device: str
    precision: str
    parameters: int
    batch_size: int
    backends: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepLogged(Event):
    """Means over the optimizer steps since the last such event, read at step `step`.

    losses: named losses, `loss` first (the weighted sum that is optimised). lr: learning rate. grad_norm: before
    clipping. images_per_s: images per second of wall time. data_wait: share of the wall time spent waiting for data,
    0 to 1. step_s: seconds per optimizer step. memory_gib, memory_peak_gib: device memory allocated now and at most
    (resident set on a CPU). eta_s: estimated seconds to the end of the run. skipped: non-finite steps so far.
    """

    kind = "step"
    step: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    images_per_s: float
    data_wait: float
    step_s: float
    memory_gib: float
    memory_peak_gib: float
    eta_s: float
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Held-out figures at `step`.

    metrics: named scalars; `score` (higher is better) or `loss` (lower is better) decides the best checkpoint.
    per_class: for segmentation, {class name: {"iou": .., "dice": ..}}. effective_rank: per encoder stage, when
    measured (method section 5).
    """

    kind = "evaluated"
    step: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    effective_rank: list[float] = field(default_factory=list)
    best: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A complete checkpoint exists at `path`, relative to the run directory.

    It was written while training went on: `seconds` is how long that took, `stall_s` how long training stood still.
    """

    kind = "checkpoint"
    step: int
    path: str
    seconds: float
    stall_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PreviewSaved(Event):
    """A picture exists at `path`, relative to the run directory."""

    kind = "preview"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the user should know and that did not stop the run (skipped step, fallback, slow data)."""

    kind = "warning"
    step: int
    message: str


@dataclass(frozen=True, kw_only=True)
class SystemSampled(Event):
    """The machine every few seconds, for whoever watches from elsewhere; NaN where nothing can be told.

    It comes from a thread of its own, so it goes on while a step, an evaluation or the data hang: a sign of life.

    gpu: the card's name, "" without one. gpu_missing: why there are no figures of a card. Memory in GiB:
    gpu_memory_used and gpu_memory_total of the card as a whole, gpu_memory_others what does not belong to this
    trainer, gpu_memory_reserved what its allocator holds. gpu_utilisation: share of the time a kernel ran, 0 to 1.
    power and power_limit in W, temperature in degrees Celsius, clocks in MHz. throttled: why the clocks are held back,
    in words. host_memory_used, host_memory_total, process_memory (resident set of the trainer) in GiB; cpu: load of
    all cores, 0 to 1.
    """

    kind = "system"
    step: int
    gpu: str = ""
    gpu_missing: str = ""
    gpu_memory_used: float = math.nan
    gpu_memory_total: float = math.nan
    gpu_memory_others: float = math.nan
    gpu_memory_reserved: float = math.nan
    gpu_utilisation: float = math.nan
    power: float = math.nan
    power_limit: float = math.nan
    temperature: float = math.nan
    sm_clock: float = math.nan
    sm_clock_max: float = math.nan
    memory_clock: float = math.nan
    throttled: list[str] = field(default_factory=list)
    host_memory_used: float = math.nan
    host_memory_total: float = math.nan
    process_memory: float = math.nan
    cpu: float = math.nan


@dataclass(frozen=True, kw_only=True)
class RequestTaken(Event):
    """A request in control/ was read at `step` and will be met after the step that is under way."""

    kind = "request"
    step: int
    request: str


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The trainer stopped. status: finished, stopped (by request or signal), failed."""

    kind = "run_ended"
    step: int
    status: str
    seconds: float
    message: str = ""


EVENTS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        StepLogged,
        Evaluated,
        CheckpointSaved,
        PreviewSaved,
        Warned,
        SystemSampled,
        RequestTaken,
        RunEnded,
    )
}


def to_line(event: Event) -> str:
    """One event as a line of JSON with its `kind` first, without the line end. Non-finite numbers become null.

    A field that is NaN by default is left out when nothing is known of it. ASCII only: a message may hold any text
    (line separators, undecodable file names) and must stay one line.
    """
    optional = {f.name for f in fields(event) if f.default != f.default}
    values = finite(asdict(event)).items()
    record = {name: value for name, value in values if not (value is None and name in optional)}
    return json.dumps({"kind": event.kind, **record}, allow_nan=False)


def from_line(line: str) -> Event | None:
    """Read one line; None for a line that is torn, of an unknown kind, or lacks a field. Unknown fields are dropped."""
    try:
        record = json.loads(line)
        cls = EVENTS[record.pop("kind")]
        known = {f.name for f in fields(cls)}
        return cls(**{k: _restored(v) for k, v in record.items() if k in known})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def best_evaluation(metrics: Path) -> Evaluated | None:
    """The last evaluation of a run that was the best so far; None when there is none."""
    best = None
    with metrics.open(encoding="utf-8") as lines:
        for line in lines:
            event = from_line(line)
            if isinstance(event, Evaluated) and event.best:
                best = event
    return best


def finite(value: Any) -> Any:
    """`value` with every non-finite number in it replaced by None, as JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _restored(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v) for v in value]
    return value
