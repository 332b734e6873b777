"""What a run is doing, honestly: from its events, its lock and how long nothing was heard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from affmae_engine.runtime.formatting import duration

if TYPE_CHECKING:
    from affmae_cli.dashboard.state import RunState

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
    """kind: the state. text: a sentence on it. hint: what can be done, "" for nothing."""

    kind: Kind
    text: str
    hint: str = ""

    @property
    def ended(self) -> bool:
        """Whether no trainer works on the run."""
        return self.kind in ENDED


def status_of(state: RunState, life: Life) -> Status:
    """The state of a run at this moment."""
    ended = state.ended
    if ended is not None:
        return _ended(state)
    dead = life.lock == "free" or life.exit_code is not None
    if dead and (state.started is not None or life.age_s > BEGINNING_S or life.exit_code is not None):
        return _gone(state, life)
    if state.started is None:
        return Status("waiting", "waiting for the trainer to begin")
    work = state.work_under_way
    limit = _limit(state)
    if life.progress_s > limit:
        return _stalled(state, life, limit)
    if not state.current:
        return Status("waiting", f"waiting for the first step, {duration(life.progress_s)} so far")
    return Status("running", work or "training")


def _ended(state: RunState) -> Status:
    ended = state.ended
    assert ended is not None
    tail = f": {ended.message}" if ended.message else ""
    text = f"{ended.status} at step {ended.step:,}{tail}"
    if ended.status == "finished":
        return Status("finished", f"finished: {ended.step:,} steps in {duration(ended.seconds)}")
    resume = f"continue with: affmae {state.task or 'pretrain'} --resume {state.root}"
    if ended.status == "stopped":
        return Status("stopped", text, resume)
    return Status("failed", text, "see the log; " + resume if state.checkpoints else "see the log")


def _gone(state: RunState, life: Life) -> Status:
    who = f" ({life.where})" if life.where else ""
    code = life.exit_code
    how = f"; exit code {code}" if code is not None and code >= 0 else f"; killed by signal {-code}" if code else ""
    if state.started is None:
        return Status("gone", f"no trainer works here{who}, and nothing was trained{how}")
    text = (
        f"the trainer is gone{who} without a word, after step {state.step:,}{how}: killed, out of memory, or a reboot"
    )
    hint = f"continue with: affmae {state.task or 'pretrain'} --resume {state.root}" if state.checkpoints else ""
    return Status("gone", text, hint)


def _stalled(state: RunState, life: Life, limit: float) -> Status:
    usual = f"one comes every {duration(state.interval_s)}" if math.isfinite(state.interval_s) else "none came yet"
    text = f"no step for {duration(life.progress_s)} ({usual}; at most {duration(limit)} was to be expected)"
    if life.silent_s < SHORTEST_STALL_S:
        return Status("stalled", f"{text}; the process is alive", "the data source may hang: see the log")
    if life.lock == "held":
        return Status("stalled", f"{text}; it still holds the run", "it may be suspended, or its disk hangs")
    return Status("stalled", f"{text}; whether it is alive cannot be told from here", f"look there{_at(life)}")


def _at(life: Life) -> str:
    return f": {life.where}" if life.where else ""


def _limit(state: RunState) -> float:
    usual = INTERVALS * state.interval_s if math.isfinite(state.interval_s) else 0.0
    slow = state.latest is None or state.work_under_way or not math.isfinite(state.interval_s)
    return max(SHORTEST_STALL_S, usual, 3 * state.longest_aside_s, SLOW_WORK_S if slow else 0.0)
