"""What a run is doing: from its events, its lock and how long nothing was heard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from affmae_engine.runtime.formatting import duration

if TYPE_CHECKING:
    from affmae_cli.dashboard.run_model import RunModel

Kind = Literal["waiting", "running", "stalled", "finished", "stopped", "failed", "gone"]
ENDED: tuple[Kind, ...] = ("finished", "stopped", "failed", "gone")
"""States in which no trainer works on the run."""

SHORTEST_STALL_S = 60.0
"""Silence that is never called a stall."""
INTERVALS = 10
"""A run that logs every t seconds stalls after so many t."""
SLOW_WORK_S = 900.0
"""Silence allowed where slow work is due: before the first step (compiling), in evaluations and checkpoints."""
BEGINNING_S = 60.0
"""Time that a new trainer may take until it has the lock."""


@dataclass(frozen=True)
class Life:
    """Signs of life besides the events.

    lock: of the run, see `Holder`. where: "process 12 on host", "" when not known. silent_s: seconds since anything new
    was read, progress_s: the same without the samples of the machine. age_s: seconds since the run was made.
    exit_code: of the trainer, when it is our child and ended.
    """

    lock: Literal["held", "free", "unknown"]
    silent_s: float
    progress_s: float
    age_s: float
    where: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Status:
    """kind: the model. text: a sentence on it. hint: what can be done, "" for nothing."""

    kind: Kind
    text: str
    hint: str = ""

    @property
    def ended(self) -> bool:
        """Whether no trainer works on the run."""
        return self.kind in ENDED


def status_of(model: RunModel, life: Life) -> Status:
    """The state of a run at this moment."""
    ended = model.ended
    if ended is not None:
        return _ended(model)
    dead = life.lock == "free" or life.exit_code is not None
    if dead and (model.started is not None or life.age_s > BEGINNING_S or life.exit_code is not None):
        return _gone(model, life)
    if model.started is None:
        return Status("waiting", "waiting for the trainer to begin")
    work = model.work_under_way
    limit = _limit(model)
    if life.progress_s > limit:
        return _stalled(model, life, limit)
    if not model.current:
        return Status("waiting", f"waiting for the first step, {duration(life.progress_s)} so far")
    return Status("running", work or "training")


def _ended(model: RunModel) -> Status:
    ended = model.ended
    assert ended is not None
    tail = f": {ended.message}" if ended.message else ""
    text = f"{ended.status} at step {ended.step:,}{tail}"
    if ended.status == "finished":
        return Status("finished", f"finished: {ended.step:,} steps in {duration(ended.seconds)}")
    resume = f"resume with: affmae {model.task or 'pretrain'} --resume {model.place}"
    if ended.status == "stopped":
        return Status("stopped", text, resume)
    return Status("failed", text, "see the log; " + resume if model.checkpoints else "see the log")


def _gone(model: RunModel, life: Life) -> Status:
    who = f" ({life.where})" if life.where else ""
    code = life.exit_code
    how = f"; exit code {code}" if code is not None and code >= 0 else f"; killed by signal {-code}" if code else ""
    if model.started is None:
        return Status("gone", f"no trainer runs here{who}, and nothing was trained{how}")
    text = f"the trainer ended{who} without a last event, after step {model.step:,}{how}: killed or out of memory"
    hint = f"resume with: affmae {model.task or 'pretrain'} --resume {model.place}" if model.checkpoints else ""
    return Status("gone", text, hint)


def _stalled(model: RunModel, life: Life, limit: float) -> Status:
    usual = f"usually one every {duration(model.interval_s)}" if math.isfinite(model.interval_s) else "none so far"
    text = f"no step for {duration(life.progress_s)} ({usual}; expected within {duration(limit)})"
    if life.silent_s < SHORTEST_STALL_S:
        return Status("stalled", f"{text}; the process is alive", "the data source may hang; see the log")
    if life.lock == "held":
        return Status("stalled", f"{text}; it still holds the run", "it may be suspended, or its disk hangs")
    return Status("stalled", f"{text}; whether it is alive is not known here", f"check there{_at(life)}")


def _at(life: Life) -> str:
    return f": {life.where}" if life.where else ""


def _limit(model: RunModel) -> float:
    usual = INTERVALS * model.interval_s if math.isfinite(model.interval_s) else 0.0
    slow = model.latest is None or model.work_under_way or not math.isfinite(model.interval_s)
    return max(SHORTEST_STALL_S, usual, 3 * model.longest_aside_s, SLOW_WORK_S if slow else 0.0)
