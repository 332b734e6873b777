"""What a run reports: one JSON object a line in `metrics.jsonl`, append-only, flushed; and an event as a line of text.

The classes here are the schema for the trainer that writes lines and for everything that reads them. The first line of
a file is a `RunStarted` with the schema version. A reader must skip kinds and fields that it does not know and a torn
last line. Times are seconds since the epoch (`time`), durations come from a monotonic clock. Lines are ordered as
written; after a resume `step` may go back to the checkpoint's step: the later line wins. What was measured beyond that
checkpoint is taken out (`train.metrics.drop_superseded`).

JSON has no NaN: numbers that are not finite are written as null, and null is read as NaN.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
from msgspec import Meta, Struct, field

from affmae_engine.run_dir import CHECKPOINT, STOP
from affmae_engine.runtime.formatting import duration, number, rate

SCHEMA_VERSION = 1
_REQUESTED = {STOP: "stop", CHECKPOINT: "save a checkpoint"}

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""Steps, images, parameters."""
Time = Annotated[float, Meta(ge=-6e10, le=1e11)]
"""Seconds since the epoch, within what calendars can show."""
if TYPE_CHECKING:
    Number = float
else:
    Number = float | None  # in a line; in memory it is a float, see `Event.__post_init__`


class Event(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of all events. `time` is the wall clock in seconds since the epoch when the event was made."""

    time: Time = field(default_factory=time.time)

    def __post_init__(self) -> None:
        for name, value in zip(self.__struct_fields__, msgspec.structs.astuple(self), strict=True):
            if value is None:
                msgspec.structs.force_setattr(self, name, math.nan)
            elif type(value) is dict or type(value) is list:
                _null_to_nan(value)

    @property
    def kind(self) -> str:
        """The `kind` of its line."""
        return str(self.__struct_config__.tag)


class RunStarted(Event, frozen=True, kw_only=True, tag="run_started"):
    """A trainer process began or resumed; `step` is the step it starts from."""

    schema: Count = SCHEMA_VERSION
    task: str
    run: str
    step: Count
    total_steps: Count
    resumed: bool
    device: str
    precision: str
    parameters: Count
    batch_size: Count
    backends: dict[str, str] = field(default_factory=dict)


class StepLogged(Event, frozen=True, kw_only=True, tag="step"):
    """Means over the optimizer steps since the last such event, read at step `step`.

    losses: named losses, `loss` first (the weighted sum that is optimised). lr: learning rate. grad_norm: before
    clipping. images_per_s: images per second of wall time. data_wait: share of the wall time spent waiting for data,
    0 to 1. step_s: seconds per optimizer step. memory_gib, memory_peak_gib: device memory allocated now and at most
    (resident set on a CPU). eta_s: estimated seconds to the end of the run. skipped: non-finite steps so far.
    """

    step: Count
    losses: dict[str, Number]
    lr: Number
    grad_norm: Number
    images_per_s: Number
    data_wait: Number
    step_s: Number
    memory_gib: Number
    memory_peak_gib: Number
    eta_s: Number
    skipped: Count = 0


class Evaluated(Event, frozen=True, kw_only=True, tag="evaluated"):
    """Held-out figures at `step`.

    metrics: named scalars; `score` (higher is better) or `loss` (lower is better) decides the best checkpoint.
    per_class: for segmentation, {class name: {"iou": .., "dice": ..}}. effective_rank: per encoder stage, when
    measured (method section 5).
    """

    step: Count
    metrics: dict[str, Number]
    per_class: dict[str, dict[str, Number]] = field(default_factory=dict)
    effective_rank: list[Number] = field(default_factory=list)
    best: bool = False
    seconds: Number = 0.0


class CheckpointSaved(Event, frozen=True, kw_only=True, tag="checkpoint"):
    """A complete checkpoint exists at `path`, relative to the run directory.

    It was written while training went on: `seconds` is how long that took, `stall_s` how long training stood still.
    """

    step: Count
    path: str
    seconds: Number
    stall_s: Number = 0.0


class PreviewSaved(Event, frozen=True, kw_only=True, tag="preview"):
    """A picture exists at `path`, relative to the run directory."""

    step: Count
    path: str


class Warned(Event, frozen=True, kw_only=True, tag="warning"):
    """Something the user should know and that did not stop the run (skipped step, fallback, slow data)."""

    step: Count
    message: str


class SystemSampled(Event, frozen=True, kw_only=True, tag="system"):
    """The machine every few seconds, for whoever watches from elsewhere; NaN where nothing can be told.

    It comes from a thread of its own, so it goes on while a step, an evaluation or the data hang: a sign of life.

    gpu: the card's name, "" without one. gpu_missing: why there are no figures of a card. Memory in GiB:
    gpu_memory_used and gpu_memory_total of the card as a whole, gpu_memory_others what does not belong to this
    trainer, gpu_memory_reserved what its allocator holds. gpu_utilisation: share of the time a kernel ran, 0 to 1.
    power and power_limit in W, temperature in degrees Celsius, clocks in MHz. throttled: why the clocks are held back,
    in words. other_gpus: the same figures of the other visible GPUs, by name. host_memory_used, host_memory_total,
    process_memory (resident set of the trainer) in GiB; cpu: load of all cores, 0 to 1. disk_free: GiB that are free on
    the disk of the run.
    """

    step: Count
    gpu: str = ""
    gpu_missing: str = ""
    gpu_memory_used: Number = math.nan
    gpu_memory_total: Number = math.nan
    gpu_memory_others: Number = math.nan
    gpu_memory_reserved: Number = math.nan
    gpu_utilisation: Number = math.nan
    power: Number = math.nan
    power_limit: Number = math.nan
    temperature: Number = math.nan
    sm_clock: Number = math.nan
    sm_clock_max: Number = math.nan
    memory_clock: Number = math.nan
    throttled: list[str] = field(default_factory=list)
    host_memory_used: Number = math.nan
    host_memory_total: Number = math.nan
    process_memory: Number = math.nan
    cpu: Number = math.nan
    disk_free: Number = math.nan
    other_gpus: list[dict[str, Number]] = field(default_factory=list)


class RequestTaken(Event, frozen=True, kw_only=True, tag="request"):
    """A request in control/ was read at `step` and will be met after the step that is under way."""

    step: Count
    request: str


class RunEnded(Event, frozen=True, kw_only=True, tag="run_ended"):
    """The trainer stopped. status: finished, stopped (by request or signal), failed."""

    step: Count
    status: str
    seconds: Number
    message: str = ""


AnyEvent = (
    RunStarted
    | StepLogged
    | Evaluated
    | CheckpointSaved
    | PreviewSaved
    | Warned
    | SystemSampled
    | RequestTaken
    | RunEnded
)
"""The type that a line of metrics.jsonl decodes to."""
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(AnyEvent)
_LEFT_OUT: dict[type[Event], set[str]] = {
    kind: {found.name for found in msgspec.structs.fields(kind) if found.default != found.default}
    for kind in get_args(AnyEvent)
}
"""Fields that are NaN by default, which a line leaves out when nothing is known of them."""


def to_line(event: Event) -> str:
    """One event as a line of JSON with its `kind` first, without the line end. Non-finite numbers become null.

    A field that is NaN by default is left out when nothing is known of it. ASCII only: a message may hold any text
    (line separators, undecodable file names) and must stay one line.
    """
    values: dict[str, Any] = finite(msgspec.to_builtins(event))
    optional = _LEFT_OUT[type(event)]
    return json.dumps({k: v for k, v in values.items() if not (v is None and k in optional)}, allow_nan=False)


def from_line(line: str | bytes) -> Event | None:
    """Read one line; None for a line that is torn, of an unknown kind, or lacks a field. Unknown fields are dropped."""
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    # msgspec refuses the escaped lone surrogates of undecodable file names; Python's own parser does not.
    try:
        return msgspec.convert(json.loads(line), AnyEvent)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None


def from_lines(data: bytes) -> list[Event | None]:
    """Read whole lines, each with its line end, as `from_line` does, but a million of them in seconds."""
    lines = data.split(b"\n")[:-1]
    try:
        events: list[Event | None] = list(_decoder.decode_lines(data))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        events = []
    # A damaged line fails the whole call, and an empty one is passed over: then only that line is lost.
    return events if len(events) == len(lines) else [from_line(line) for line in lines]


def best_evaluation(metrics: Path) -> Evaluated | None:
    """The last evaluation of a run that was the best so far; None when there is none."""
    best = None
    with metrics.open("rb") as lines:
        for line in lines:
            event = from_line(line)
            if isinstance(event, Evaluated) and event.best:
                best = event
    return best


def line(event: Event, total_steps: int) -> str:
    """One event as a line for log.txt and for terminals; "" for a kind that is not shown."""
    match event:
        case RunStarted():
            begin = f"resumed at step {event.step}" if event.resumed else "started"
            return (
                f"{event.task} {event.run} {begin}: {event.total_steps} steps of {event.batch_size} images, "
                f"{event.parameters / 1e6:.1f} M parameters, {event.device}"
            )
        case StepLogged():
            return _step_text(event, total_steps)
        case Evaluated():
            figures = "  ".join(f"{name} {number(value)}" for name, value in event.metrics.items())
            best = "  (best so far)" if event.best else ""
            return f"held-out at step {event.step}  {figures}{best}"
        case CheckpointSaved():
            return f"saved {event.path} in {event.seconds:.1f}s"
        case PreviewSaved():
            return f"picture {event.path}"
        case Warned():
            return f"warning: {event.message}"
        case RequestTaken():
            return f"asked to {_REQUESTED.get(event.request, event.request)}: after this step"
        case RunEnded():
            tail = f": {event.message}" if event.message else ""
            return f"{event.status} at step {event.step} after {duration(event.seconds)}{tail}"
        case _:
            return ""


def finite(value: Any) -> Any:
    """`value` with every non-finite number in it replaced by None, as JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _step_text(event: StepLogged, total_steps: int) -> str:
    width = len(str(total_steps))
    losses = "  ".join(f"{name} {number(value)}" for name, value in event.losses.items())
    skipped = f"  skipped {event.skipped}" if event.skipped else ""
    return (
        f"step {event.step:>{width}}/{total_steps}  {losses}  lr {event.lr:.2e}  {rate(event.images_per_s)} images/s  "
        f"wait {event.data_wait:.0%}  {event.memory_peak_gib:.1f} GiB{skipped}  eta {duration(event.eta_s)}"
    )


def _null_to_nan(values: Any) -> None:
    """Replace None by NaN in a dict or list, and in those within it, in place."""
    for key, value in values.items() if type(values) is dict else enumerate(values):
        if value is None:
            values[key] = math.nan
        elif type(value) is dict or type(value) is list:
            _null_to_nan(value)
