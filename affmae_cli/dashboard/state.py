"""Everything that is known of one run, updated event by event. No I/O, no clock: times come from the events.

It may be read by one thread while another feeds it: attributes are replaced, never changed half-way.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from affmae_cli.dashboard.decode import Segment, StepBatch
from affmae_cli.dashboard.series import Series
from affmae_cli.dashboard.verdicts import Verdict, collapse_verdict, possible_ranks, speed_verdict, system_verdicts
from affmae_engine.config import RunConfig
from affmae_engine.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PreviewSaved,
    RunEnded,
    RunStarted,
    StepLogged,
    SystemSampled,
    Warned,
)
from affmae_engine.train.schedule import due

RECENT = 200
"""Events kept for the list of last events."""


class RunState:
    """One run as its events tell it.

    steps: over the step: `losses.NAME` (the total is `losses.loss`), `lr`, `grad_norm`, `images_per_s`, `data_wait`,
    `step_s`, `memory_gib`. held_out: over the step: `NAME` of each metric, `CLASS.iou`, `CLASS.dice`, `rank.1` and on.
    systems: over the time in seconds since 1970: `SYSTEM_COLUMNS`.
    started, latest, evaluated, best, system, ended: the newest event of that kind; ended is None while a trainer may be
    at work. left: the trainer is gone without such an event (set by the reader, which can tell). recent: the last
    notable events, oldest first. previews: newest last.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config: RunConfig | None = None
        self.left = False
        self.forget()

    def forget(self) -> None:
        """Back to knowing no event: the file was replaced."""
        self.steps, self.held_out, self.systems = Series(), Series(), Series()
        self.started: RunStarted | None = None
        self.latest: StepLogged | None = None
        self.evaluated: Evaluated | None = None
        self.best: Evaluated | None = None
        self.system: SystemSampled | None = None
        self.ended: RunEnded | None = None
        self.recent: deque[Event] = deque(maxlen=RECENT)
        self.previews: list[PreviewSaved] = []
        self.checkpoints: list[CheckpointSaved] = []
        self.warnings = 0
        self.highest_ranks: list[float] = []
        self.last_time = self.last_progress = math.nan
        self.longest_aside_s = 0.0
        self._before_s = 0.0
        self._intervals: deque[float] = deque(maxlen=9)
        self._waits: deque[float] = deque(maxlen=5)
        self._lines = 0

    def apply(self, segments: Iterable[Segment]) -> None:
        """Take in what was read, in order."""
        for segment in segments:
            if segment.started is not None:
                self._begin(segment.started)
            if segment.steps is not None:
                self._steps(segment.steps)
            if segment.systems is not None:
                self.system = segment.systems.last
                self.systems.add(segment.systems.time_N, segment.systems.columns)
                self.last_time = float(segment.systems.time_N[-1])
            self._events(segment.events)

    @property
    def task(self) -> str:
        """pretrain, finetune, or "" before it is known."""
        return self.started.task if self.started else ""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        if self.ended is not None:
            return self.ended.step
        if self.latest is not None and self.current:
            return self.latest.step
        return self.started.step if self.started is not None else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 before it is known."""
        return self.started.total_steps if self.started else 0

    @property
    def progress(self) -> float:
        """Share of the steps that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def elapsed_s(self, now: float) -> float:
        """Seconds that trainers worked on the run, all its processes together. now: seconds since 1970."""
        if self.started is None:
            return 0.0
        if self.ended is not None:
            return self._before_s + self.ended.seconds
        return self._before_s + max(0.0, (self.last_time if self.left else now) - self.started.time)

    def eta_s(self, now: float) -> float:
        """Seconds to the end of the whole run; 0 when it ended, NaN when it cannot be told."""
        if self.ended is not None:
            return 0.0
        if self.latest is None or self.left or not self.current:
            return math.nan
        return max(0.0, self.latest.eta_s - max(0.0, now - self.latest.time))

    @property
    def current(self) -> bool:
        """Whether the newest step line is of the newest process. Lines are in order, their clocks need not be."""
        return self._lines > 0

    @property
    def on_cpu(self) -> bool:
        """Whether the run computes on the CPU."""
        return self.started is not None and "CPU (" in self.started.device

    @property
    def megapixels_per_s(self) -> float:
        """Throughput in millions of pixels a second; NaN before it is known."""
        if self.latest is None or self.config is None:
            return math.nan
        return self.latest.images_per_s * self.config.image_size**2 / 1e6

    @property
    def data_wait(self) -> float:
        """Share of the wall time spent waiting for data over the last lines, 0 to 1; NaN before it is known."""
        known = [value for value in self._waits if math.isfinite(value)]
        return statistics.fmean(known) if known else math.nan

    @property
    def interval_s(self) -> float:
        """Usual seconds between two step lines; NaN before there are two."""
        return statistics.median(self._intervals) if self._intervals else math.nan

    @property
    def work_under_way(self) -> str:
        """What the trainer does besides steps just now, as far as the configuration tells; "" for nothing."""
        if self.latest is None or self.config is None or self.ended is not None or not self.current:
            return ""
        train, step = self.config.train, self.latest.step
        done = {type(event) for event in list(self.recent)[-20:] if getattr(event, "step", -1) == step}
        for every, kind, text in (
            (train.eval_every, Evaluated, "evaluating"),
            (train.preview_every, PreviewSaved, "drawing a preview"),
            (train.checkpoint_every, CheckpointSaved, "saving a checkpoint"),
        ):
            if due(every, step, train.steps) and kind not in done:
                return f"{text} at step {step:,}"
        return ""

    @property
    def preview(self) -> Path | None:
        """The newest picture; None before there is one."""
        return self.root / self.previews[-1].path if self.previews else None

    def verdicts(self) -> list[Verdict]:
        """What the figures mean, the speed first."""
        wait = self.data_wait if self._lines > 1 else math.nan
        found = [speed_verdict(wait, self.system, on_cpu=self.on_cpu), *system_verdicts(self.system)]
        ranks = self.evaluated.effective_rank if self.evaluated else []
        possible = possible_ranks(self.config) if self.config is not None else [0.0] * len(ranks)
        collapse = collapse_verdict(ranks, self.highest_ranks, possible)
        return [*found, collapse] if collapse is not None else found

    def _steps(self, batch: StepBatch) -> None:
        if self.latest is not None and self.current and batch.last.time > self.latest.time:
            self._intervals.append((batch.last.time - self.latest.time) / len(batch.step_N))
        self.steps.add(batch.step_N, batch.columns, batch.offset_N)
        if self._lines == 1:  # the first line has the start of the data workers in it
            self._waits.clear()
        waits = batch.columns["data_wait"][1 if self._lines == 0 and len(batch.step_N) > 1 else 0 :]
        self._waits = deque([*self._waits, *waits[-5:].tolist()], 5)
        self._lines += len(batch.step_N)
        self.latest = batch.last
        self.last_time = self.last_progress = batch.last.time

    def _events(self, events: Sequence[Event]) -> None:
        self.recent = deque([*self.recent, *events[-RECENT:]], RECENT)
        for event in events:
            match event:
                case CheckpointSaved():
                    self.checkpoints = [*(c for c in self.checkpoints[-9:] if c.step < event.step), event]
                    self.longest_aside_s = max(self.longest_aside_s, event.seconds)
                case PreviewSaved():
                    self.previews = [*(p for p in self.previews[-199:] if p.path != event.path), event]
                case Warned():
                    self.warnings += 1
                case RunEnded():
                    self.ended = event
        self._evaluations([event for event in events if isinstance(event, Evaluated)])
        for event in events[-1:]:
            self.last_progress = float(np.fmax(self.last_progress, event.time))
            self.last_time = float(np.fmax(self.last_time, event.time))

    def _begin(self, event: RunStarted) -> None:
        if self.started is not None:
            before = self.ended.seconds if self.ended is not None else self.last_progress - self.started.time
            self._before_s += max(0.0, before)
        self.started, self.ended = event, None
        self._intervals.clear()
        self._waits.clear()
        self._lines = 0
        # What a killed process did after its last checkpoint is done again.
        self.steps.cut(event.step + 0.5)
        self.held_out.cut(event.step + 0.5)
        self.checkpoints = [saved for saved in self.checkpoints if saved.step <= event.step]

    def _evaluations(self, events: Sequence[Evaluated]) -> None:
        if not events:
            return
        self.evaluated = events[-1]
        self.best = next((event for event in reversed(events) if event.best), self.best)
        self.longest_aside_s = max(self.longest_aside_s, *(event.seconds for event in events))
        for ranks in (event.effective_rank for event in events if event.effective_rank):
            tops = self.highest_ranks or ranks
            self.highest_ranks = [float(np.fmax(*pair)) for pair in zip(ranks, tops, strict=False)]
        rows = [_figures(event) for event in events]
        columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in {**rows[0], **rows[-1]}}
        self.held_out.add(np.array([event.step for event in events]), columns)


def _figures(event: Evaluated) -> dict[str, float]:
    """Every figure of an evaluation by the name of its curve."""
    figures = dict(event.metrics)
    for name, scores in event.per_class.items():
        figures |= {f"{name}.{key}": value for key, value in scores.items()}
    return figures | {f"rank.{stage}": rank for stage, rank in enumerate(event.effective_rank, 1)}
