"""One run that is followed: reads what is new in its directory and keeps a `RunState` and a `Status` up to date.

A reader takes nothing from the run but bytes: it works for a live or a finished run, on a local or a mounted disk, and
for a folder that holds no run yet. A poll reads for a fraction of a second at most, so that a viewer stays responsive
while a long run is opened.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from affmae_cli.dashboard.decode import decode
from affmae_cli.dashboard.series import Series
from affmae_cli.dashboard.sketch import sketch
from affmae_cli.dashboard.state import RunState
from affmae_cli.dashboard.status import Life, Status, status_of
from affmae_cli.dashboard.tail import LineTail, last_lines
from affmae_engine.errors import AffmaeError
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime.locks import Holder

LOCK_EVERY_S = 2.0
"""Seconds between two looks at the lock."""
SKETCHED_FROM = 1 << 25
"""Bytes of events from which on a run is sketched before it is read."""


class RunReader:
    """Follows a run. Everything it raises for is a bug: whatever the directory holds or lacks is shown, not raised.

    state: what is known. status: what the run is doing, as of the last poll. problem: what is wrong with config.toml,
    "" for nothing.

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
        self.run = RunDir(root)
        self.state = RunState(root)
        self.status = Status("waiting", "reading the run")
        self.problem = ""
        self._tail = LineTail(self.run.metrics)
        self._exit_code, self._clock, self._now = exit_code, clock, now
        self._opening, self._begun = True, False
        self._sketch: RunState | None = None
        self._holder, self._holder_at = Holder("unknown"), -math.inf
        self._heard = self._progressed = (0.0, clock())
        self._config_of: object = None

    @property
    def behind(self) -> bool:
        """Whether the run is still being opened: poll again at once."""
        return self._opening

    @property
    def shown(self) -> RunState | None:
        """What is worth drawing: all that is known; a sketch while a long run is opened, None where there is none."""
        return self._sketch if self._opening else self.state

    @property
    def share_read(self) -> float:
        """Share of metrics.jsonl that was read, 0 to 1."""
        try:
            return min(1.0, self._tail.offset / max(1, self.run.metrics.stat().st_size))
        except OSError:
            return 1.0

    def poll(self, seconds: float = 0.1) -> bool:
        """Read what is new, for about `seconds` at most; returns whether there was anything."""
        exit_code = self._exit_code()
        holder = self._look_at_lock()  # before reading: a trainer writes its last event before it lets the lock go
        until = self._clock() + seconds
        before = self.state.last_time, self.state.last_progress
        restarted, found = False, False
        if self._opening and self._sketch is None and self._is_long():
            self._draw_sketch()
            return True
        while True:
            lines = self._tail.read()
            if lines.restarted:
                self.state.forget()
                self._opening, self._sketch, restarted = True, None, True
            if lines.data:
                self.state.apply(decode(lines.data, lines.offset))
                found = True
            if not lines.more or self._clock() > until:
                break
        self._listen(before)
        self._opening = self._opening and lines.more
        self._read_config()
        self._begun = self._begun or self.state.started is not None
        if self._begun and self.state.started is None and not os.path.isdir(self.run.root):  # noqa: PTH112 (never raises)
            self.status = Status("gone", f"{self.run.root} was removed or renamed")
        elif self._tail.refusal:
            self.status = Status("waiting", self._tail.refusal.message, self._tail.refusal.hint)
        elif self._opening:
            self.status = self._reading()
        else:
            self._sketch = None
            self.status = status_of(self.state, self._life(holder, exit_code))
            self.state.left = self.status.kind == "gone"
        return found or restarted

    def zoom(self, low: float, high: float) -> Series:
        """The steps from `low` to `high` point by point where the run's own series are too coarse; reads the file."""
        series = Series()
        start, end = self.state.steps.byte_range(low, high)
        try:
            with self.run.metrics.open("rb") as file:
                file.seek(start)
                while end is None or start < end:
                    data = file.readlines(1 << 20)
                    if not data:
                        break
                    joined = b"".join(data)[: None if end is None else end - start]
                    for steps in (segment.steps for segment in decode(joined, start)):
                        if steps is not None:
                            inside = (steps.step_N >= low) & (steps.step_N <= high)
                            columns = {name: value[inside] for name, value in steps.columns.items()}
                            series.add(steps.step_N[inside], columns, steps.offset_N[inside])
                    start += len(joined)
        except OSError:
            return Series()
        return series

    def log_tail(self, count: int) -> list[str]:
        """The last lines of log.txt."""
        return last_lines(self.run.log, count)

    def config_text(self) -> str:
        """config.toml as it is; "" when it cannot be read."""
        try:
            return self.run.config.read_text("utf-8", "replace")
        except OSError:
            return ""

    def environment(self) -> dict[str, Any]:
        """environment.json; {} when it cannot be read."""
        return self.run.read_json(self.run.environment)

    def _is_long(self) -> bool:
        try:
            return self.run.metrics.stat().st_size >= SKETCHED_FROM
        except OSError:
            return False

    def _draw_sketch(self) -> None:
        self._read_config()
        self._sketch = sketch(self.run.root, self.run.metrics)
        self._sketch.config = self.state.config
        self.status = self._reading()

    def _reading(self) -> Status:
        text = f"reading the run: {self.share_read:.0%}"
        return Status("waiting", f"{text}, curves are a sketch until then" if self._sketch is not None else text)

    def _look_at_lock(self) -> Holder:
        if self._clock() - self._holder_at >= LOCK_EVERY_S:
            self._holder, self._holder_at = self.run.holder(), self._clock()
        return self._holder

    def _listen(self, before: tuple[float, float]) -> None:
        # The trainer's clock may be another machine's. It counts only for what happened before we looked.
        for name, last, old in zip(
            ("_heard", "_progressed"), (self.state.last_time, self.state.last_progress), before, strict=True
        ):
            if last == last and last != old:
                age = max(0.0, self._now() - last) if self._opening else 0.0
                setattr(self, name, (age, self._clock()))

    def _life(self, holder: Holder, exit_code: int | None) -> Life:
        where = f"process {holder.process} on {holder.host}" if holder.process is not None else ""
        try:
            age = self._now() - self.run.config.stat().st_mtime
        except OSError:
            age = 0.0
        silent, progress = (base + self._clock() - since for base, since in (self._heard, self._progressed))
        return Life(holder.state, silent, progress, age, where, exit_code)

    def _read_config(self) -> None:
        # A resumed run may have been made longer, so every process has its own.
        if self.state.started is self._config_of and self.state.config is not None:
            return
        try:
            self.state.config, self.problem = self.run.read_config(), ""
        except AffmaeError as error:
            self.problem = error.message
        self._config_of = self.state.started
