"""How fast a run trains, from its events: start-up apart from the steady state, which is what a budget is turned into
steps by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from affmae_engine.data.loading import PREFETCH
from affmae_engine.events import Evaluated, Event, RunStarted, StepLogged
from affmae_engine.train.signals import StopRequest
from affmae_engine.train.step import EAGER_STEPS

WARMUP_STEPS = {"cuda": EAGER_STEPS + 8 * PREFETCH + 6, "cpu": 3}
"""Steps that count as start-up: they compile, record, and use up what eight loading processes prepared ahead."""
FEWEST_WINDOWS = 5
"""Of steady steps that a calibration measures at least."""


@dataclass
class Pace:
    """A sink of events that keeps what a result needs, and asks for a stop once it has measured for long enough."""

    warmup: int
    on_step: Callable[[int, int], None] = lambda step, total: None
    enough_s: float = math.inf
    stop: StopRequest = field(default_factory=StopRequest)
    windows: list[tuple[int, float]] = field(default_factory=list)
    """Steps and seconds per step between two logged events."""
    started: RunStarted | None = None
    last: StepLogged | None = None
    evaluated: Evaluated | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, RunStarted):
            self.started = event
        elif isinstance(event, Evaluated):
            self.evaluated = event
        elif isinstance(event, StepLogged):
            self.windows.append((event.step - (self.last.step if self.last else 0), event.step_s))
            self.last = event
            self.on_step(event.step, self.started.total_steps if self.started else event.step)
            steady = self._steady()
            if len(steady) >= FEWEST_WINDOWS and sum(n * step_s for n, step_s in steady) >= self.enough_s:
                self.stop.request()

    @property
    def train_s(self) -> float:
        """Wall-clock of all steps."""
        return sum(n * step_s for n, step_s in self.windows)

    @property
    def step_s(self) -> float:
        """Median seconds of a step after the start-up."""
        return statistics.median(step_s for _, step_s in self._steady() or self.windows)

    @property
    def startup_s(self) -> float:
        """What the first steps took beyond the usual."""
        steady = self._steady()
        if not steady:
            return 0.0
        first = self.windows[: len(self.windows) - len(steady)]
        return sum(max(0.0, step_s - self.step_s) * n for n, step_s in first)

    def _steady(self) -> list[tuple[int, float]]:
        """The windows that began after the warm-up."""
        before, steady = 0, []
        for n, step_s in self.windows:
            if before >= self.warmup:
                steady.append((n, step_s))
            before += n
        return steady
