"""Events as lines of text, for log.txt and for terminals that are not one."""

from __future__ import annotations

import math

from affmae_engine.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PreviewSaved,
    RequestTaken,
    RunEnded,
    RunStarted,
    StepLogged,
    Warned,
)
from affmae_engine.run_dir import CHECKPOINT, STOP

_REQUESTED = {STOP: "stop", CHECKPOINT: "save a checkpoint"}


def duration(seconds: float) -> str:
    """A duration in two units at most: 45s, 12m, 1h05m, 3d04h; "-" when it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, whole = int(seconds) // 60, int(seconds)
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m{whole % 60:02d}s" if minutes < 10 else f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes // 60 % 24:02d}h"


def number(value: float) -> str:
    """A loss or a score in six characters or so."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def rate(value: float) -> str:
    """Images per second with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(event: Event, total_steps: int) -> str:
    """One event as one line; "" for a kind that is not shown."""
    match event:
        case RunStarted():
            begin = f"resumed at step {event.step}" if event.resumed else "started"
            return (
                f"{event.task} {event.run} {begin}: {event.total_steps} steps of {event.batch_size} images, "
                f"{event.parameters / 1e6:.1f} M parameters, {event.device}"
            )
        case StepLogged():
            return _step_line(event, total_steps)
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


def _step_line(event: StepLogged, total_steps: int) -> str:
    width = len(str(total_steps))
    losses = "  ".join(f"{name} {number(value)}" for name, value in event.losses.items())
    skipped = f"  skipped {event.skipped}" if event.skipped else ""
    return (
        f"step {event.step:>{width}}/{total_steps}  {losses}  lr {event.lr:.2e}  {rate(event.images_per_s)} images/s  "
        f"wait {event.data_wait:.0%}  {event.memory_peak_gib:.1f} GiB{skipped}  eta {duration(event.eta_s)}"
    )
