"""One run that is followed: reads what is new in its directory and keeps what is known of it.

`RunModel.poll` runs in a thread; panes read the attributes, which are replaced and never changed half-way. It takes
nothing from the run but bytes, so it works for a live or a finished run, on a local or a mounted disk, and for a folder
that holds no run yet.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from affmae_cli.dashboard.columns import Columns
from affmae_cli.dashboard.status import Life, Status, status_of
from affmae_cli.dashboard.tail import LineTail, tail_bytes
from affmae_cli.dashboard.verdicts import Verdict, verdicts_of
from affmae_engine.config import RunConfig
from affmae_engine.errors import AffmaeError
from affmae_engine.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PreviewSaved,
    RequestTaken,
    RunEnded,
    RunStarted,
    StepLogged,
    SystemSampled,
    from_lines,
)
from affmae_engine.run_dir import REQUESTS, RunDir
from affmae_engine.runtime.locks import Holder
from affmae_engine.train.schedule import due

STEP_COLUMNS = ("lr", "grad_norm", "images_per_s", "data_wait", "step_s", "memory_gib", "skipped")
"""Fields of a `step` event that are drawn over the steps, besides its losses ("losses.NAME")."""
SYSTEM_COLUMNS = (
    "gpu_memory_used", "gpu_utilisation", "power", "temperature", "sm_clock", "host_memory_used", "cpu", "disk_free",
)  # fmt: skip
"""Fields of a `system` event that are drawn over time."""
ORIGIN = ".origin"
"""File in a copy of a folder of another machine, with HOST:PATH of what it is a copy of."""
LOCK_EVERY_S = 2.0
_KEPT_EVENTS, _KEPT_PREVIEWS = 200, 400
_END = 1 << 17


class RunModel:
    """What is known of the run at `root`.

    steps: columns over the step: "losses.NAME" (the total is "losses.loss") and `STEP_COLUMNS`. held_out: over the
    step: each metric, "CLASS.iou" and "CLASS.dice" by class, "rank.1" and on by encoder stage. systems: over seconds
    since 1970: `SYSTEM_COLUMNS`; "gpu1.NAME" and on for further GPUs.
    place: the run's path as people know it, HOST:PATH for a copy.
    started, latest, evaluated, best, system, ended: the newest event of that kind, None before there is one; `ended` is
    None again once a trainer resumes. events: notable events, oldest first. previews: newest last.
    problem: what is wrong with config.toml, "" for nothing. status: what the run was doing at the last poll.

    Args:
        root: the run directory; need not exist yet.
        exit_code: of the trainer when it is our child: None while it works.
        clock: monotonic seconds. now: seconds since 1970.
    """

    def __init__(
        self,
        root: Path,
        *,
        exit_code: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.root, self.run = root, RunDir(root)
        self.place = _place(root)
        self.status = Status("waiting", "reading the run")
        self.config: RunConfig | None = None
        self.environment: dict[str, Any] = {}
        self.problem = ""
        self._tail = LineTail(self.run.metrics)
        self._exit_code, self._clock, self.now = exit_code, clock, now
        self.opening, self._begun = True, False
        self._holder, self._holder_at = Holder("unknown"), -math.inf
        self._config_of: object = None
        self._forget()

    def _forget(self) -> None:
        """Back to knowing no event: the file was replaced."""
        self.steps, self.held_out, self.systems = Columns(), Columns(), Columns()
        self.started: RunStarted | None = None
        self.latest: StepLogged | None = None
        self.evaluated: Evaluated | None = None
        self.best: Evaluated | None = None
        self.system: SystemSampled | None = None
        self.ended: RunEnded | None = None
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self.previews: list[PreviewSaved] = []
        self.checkpoints: list[CheckpointSaved] = []
        self.highest_ranks: list[float] = []
        self.longest_aside_s = 0.0
        self._lines, self._before_s = 0, 0.0
        self._intervals: deque[float] = deque(maxlen=9)
        self._heard = self._progressed = (math.nan, 0.0, self._clock())

    # Reading

    def poll(self, seconds: float = 0.1) -> bool:
        """Read what is new, for about `seconds` at most; returns whether there was anything."""
        exit_code = self._exit_code()
        holder = self._look_at_lock()  # before reading: a trainer writes its last event before it lets the lock go
        until, found = self._clock() + seconds, False
        while True:
            lines = self._tail.read()
            if lines.restarted:
                self._forget()
                self.opening = found = True
            if lines.data:
                self.apply(from_lines(lines.data))
                found = True
            if not lines.more or self._clock() > until:
                break
        self.opening = self.opening and lines.more
        self._read_config()
        self._begun = self._begun or self.started is not None
        if self._begun and self.started is None and not self.root.is_dir():
            self.status = Status("gone", f"{self.root} was removed or renamed")
        elif self._tail.refusal:
            self.status = Status("waiting", self._tail.refusal.message, self._tail.refusal.hint)
        elif self.opening:
            self.status = Status("waiting", f"reading the run: {self.share_read:.0%}")
        else:
            self.status = status_of(self, self._life(holder, exit_code))
        return found

    def glance(self) -> None:
        """Read the beginning and the end of the events alone: enough for a row of a table. Instead of `poll`."""
        holder = self._look_at_lock()
        head = b""
        with contextlib.suppress(OSError), self.run.metrics.open("rb") as file:
            head = file.read(1 << 14)
        end = tail_bytes(self.run.metrics, _END)
        if len(head) == 1 << 14:
            self.apply(from_lines(head[: head.rfind(b"\n") + 1]))
        self.apply(from_lines(end[: end.rfind(b"\n") + 1]))
        self.opening = False
        self._read_config()
        self.status = status_of(self, self._life(holder, None))

    def log_tail(self, size: int = 1 << 18) -> list[str]:
        """The last lines of log.txt, of its last `size` bytes."""
        return tail_bytes(self.run.log, size).decode("utf-8", "replace").splitlines()

    @property
    def share_read(self) -> float:
        """Share of metrics.jsonl that was read, 0 to 1."""
        try:
            return min(1.0, self._tail.offset / max(1, self.run.metrics.stat().st_size))
        except OSError:
            return 1.0

    # What is known

    @property
    def task(self) -> str:
        """pretrain, finetune, or "" before it is known."""
        return self.started.task if self.started else str(self.environment.get("task", ""))

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

    @property
    def current(self) -> bool:
        """Whether the newest step line is of the newest process. Lines are in order, their clocks need not be."""
        return self._lines > 0

    @property
    def elapsed_s(self) -> float:
        """Seconds that trainers worked on the run, all its processes together."""
        if self.started is None:
            return 0.0
        if self.ended is not None:
            return self._before_s + self.ended.seconds
        until = self._heard[0] if self.status.kind == "gone" else self.now()
        return self._before_s + max(0.0, until - self.started.time)

    @property
    def eta_s(self) -> float:
        """Seconds to the end of the run; 0 when it ended, NaN when it is not known."""
        if self.ended is not None:
            return 0.0
        if self.latest is None or self.status.kind == "gone" or not self.current:
            return math.nan
        return max(0.0, self.latest.eta_s - max(0.0, self.now() - self.latest.time))

    @property
    def on_cpu(self) -> bool:
        return self.started is not None and "CPU (" in self.started.device

    @property
    def megapixels_per_s(self) -> float:
        """Throughput in millions of pixels a second; NaN before it is known."""
        if self.latest is None or self.config is None:
            return math.nan
        return self.latest.images_per_s * self.config.image_size**2 / 1e6

    @property
    def data_wait(self) -> float:
        """Share of the wall time spent waiting for data over the last five lines, 0 to 1; NaN before it is known.

        The first line of a process has the start of its data workers in it and does not count.
        """
        return self.steps.last("data_wait", min(5, self._lines - 1)) if self._lines > 1 else math.nan

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
        done = {type(event) for event in list(self.events)[-20:] if getattr(event, "step", -1) == step}
        for every, kind, text in (
            (train.eval_every, Evaluated, "evaluating"),
            (train.preview_every, PreviewSaved, "drawing a preview"),
            (train.checkpoint_every, CheckpointSaved, "saving a checkpoint"),
        ):
            if due(every, step, train.steps) and kind not in done:
                return f"{text} at step {step:,}"
        return ""

    @property
    def classes(self) -> dict[str, int]:
        """Class names of a segmentation that were scored, with the class numbers that decide their colors."""
        names = list(self.config.finetune.class_names or ()) if self.config is not None else []
        scored = list(self.evaluated.per_class) if self.evaluated else []
        first = 0 if len(scored) >= len(names) else len(names) - len(scored)
        return {name: names.index(name) if name in names else first + i for i, name in enumerate(scored)}

    @property
    def verdicts(self) -> list[Verdict]:
        """What the figures mean and what can be done, the speed first."""
        return verdicts_of(self)

    @property
    def requests(self) -> list[str]:
        """Requests that the trainer has not taken yet, or has not met, in words; [] once the run ended."""
        if self.status.ended:
            return []
        waiting = [name for name in REQUESTS if (self.run.control / name).exists()]
        said = [f"{name} requested, not yet seen by the trainer" for name in waiting]
        for name in REQUESTS:
            taken = [i for i, e in enumerate(self.events) if isinstance(e, RequestTaken) and e.request == name]
            met = [i for i, e in enumerate(self.events) if isinstance(e, (CheckpointSaved, RunStarted))]
            if taken and name not in waiting and (not met or met[-1] < taken[-1]):
                said.append(f"{name} acknowledged, it comes after this step")
        return said

    # Taking in events

    def apply(self, events: Iterable[Event | None]) -> None:
        """Take in events in order; None, which stands for a damaged or unknown line, is skipped."""
        steps: list[StepLogged] = []
        systems: list[SystemSampled] = []
        for event in events:
            if isinstance(event, StepLogged):
                steps.append(event)
            elif isinstance(event, SystemSampled):
                systems.append(event)
            elif event is not None:
                if isinstance(event, RunStarted | RunEnded):
                    self._take_steps(steps)
                    steps = []
                self._take_event(event)
        self._take_steps(steps)
        self._take_systems(systems)

    def _take_steps(self, events: list[StepLogged]) -> None:
        if not events:
            return
        rows = [
            {name: getattr(event, name) for name in STEP_COLUMNS}
            | {f"losses.{name}": value for name, value in event.losses.items()}
            for event in events
        ]
        last = events[-1]
        if self.latest is not None and self.current and last.time > self.latest.time:
            self._intervals.append((last.time - self.latest.time) / len(events))
        self.steps.extend([event.step for event in events], rows)
        self._lines += len(events)
        self.latest = last
        self._listen(last.time, progress=True)

    def _take_systems(self, events: list[SystemSampled]) -> None:
        if not events:
            return
        rows = []
        for event in events:
            row = {name: getattr(event, name) for name in SYSTEM_COLUMNS}
            for number, other in enumerate(event.other_gpus, 1):
                row |= {f"gpu{number}.{name}": value for name, value in other.items()}
            rows.append(row)
        self.systems.extend([event.time for event in events], rows)
        self.system = events[-1]
        self._listen(events[-1].time)

    def _take_event(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._begin(event)
            case Evaluated():
                self._take_evaluation(event)
            case CheckpointSaved():
                self.checkpoints = [*(c for c in self.checkpoints[-9:] if c.step < event.step), event]
                self.longest_aside_s = max(self.longest_aside_s, event.seconds)
            case PreviewSaved():
                self.previews = [*(p for p in self.previews[1 - _KEPT_PREVIEWS :] if p.path != event.path), event]
            case RunEnded():
                self.ended = event
        self.events = deque([*self.events, event], _KEPT_EVENTS)
        self._listen(event.time, progress=True)

    def _begin(self, event: RunStarted) -> None:
        if self.started is not None:
            before = self.ended.seconds if self.ended is not None else self._progressed[0] - self.started.time
            self._before_s += max(0.0, before)
        self.started, self.ended, self._lines = event, None, 0
        self._intervals.clear()
        # What a killed process did after its last checkpoint is done again.
        self.steps.cut(event.step + 0.5)
        self.held_out.cut(event.step + 0.5)
        self.checkpoints = [saved for saved in self.checkpoints if saved.step <= event.step]

    def _take_evaluation(self, event: Evaluated) -> None:
        self.longest_aside_s = max(self.longest_aside_s, event.seconds)
        if event.effective_rank:
            tops = self.highest_ranks or event.effective_rank
            pairs = zip(event.effective_rank, tops, strict=False)
            self.highest_ranks = [float(np.fmax(*pair)) for pair in pairs]
        row = dict(event.metrics)
        for name, scores in event.per_class.items():
            row |= {f"{name}.{key}": value for key, value in scores.items()}
        row |= {f"rank.{stage}": rank for stage, rank in enumerate(event.effective_rank, 1)}
        self.held_out.extend([event.step], [row])
        self.evaluated, self.best = event, event if event.best else self.best

    # Signs of life

    def _listen(self, at: float, *, progress: bool = False) -> None:
        # The trainer's clock may be another machine's. It counts only for what happened before we looked.
        age = max(0.0, self.now() - at) if self.opening else 0.0
        self._heard = (at, age, self._clock())
        if progress:
            self._progressed = self._heard

    def _look_at_lock(self) -> Holder:
        if self._clock() - self._holder_at >= LOCK_EVERY_S:
            self._holder, self._holder_at = self.run.holder(), self._clock()
        return self._holder

    @property
    def made_at(self) -> float:
        """When the run was made, seconds since 1970."""
        try:
            return self.run.config.stat().st_mtime
        except OSError:
            return self.now()

    @property
    def last_time(self) -> float:
        """Of the newest event, or when the run was made; seconds since 1970."""
        return self._heard[0] if math.isfinite(self._heard[0]) else self.made_at

    def _life(self, holder: Holder, exit_code: int | None) -> Life:
        where = f"process {holder.process} on {holder.host}" if holder.process is not None else ""
        silent, progress = (age + self._clock() - since for _, age, since in (self._heard, self._progressed))
        return Life(holder.state, silent, progress, self.now() - self.made_at, where, exit_code)

    def _read_config(self) -> None:
        # A resumed run may have been made longer, so every process has its own.
        if self.started is self._config_of and self.config is not None:
            return
        self.environment = self.run.read_json(self.run.environment)
        try:
            self.config, self.problem = self.run.read_config(), ""
        except AffmaeError as error:
            self.problem = error.message
        self._config_of = self.started


def _place(root: Path) -> str:
    for folder in (root, root.parent):
        with contextlib.suppress(OSError):
            origin = (folder / ORIGIN).read_text("utf-8").strip()
            return origin if folder == root else f"{origin}/{root.name}"
    return str(root)
