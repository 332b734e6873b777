"""What a run records: events to metrics.jsonl and to the sinks, sums on the device, time on the host.

Nothing here reads the device except `Window.read`, which the trainer calls when it logs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affmae_engine import atomic
from affmae_engine.events import CheckpointSaved, Evaluated, Event, PreviewSaved, StepLogged, from_line, to_line

Sink = Callable[[Event], None]
_REMEMBERED = 9  # laps, and interruptions of a kind, that the time left is estimated from

_log = logging.getLogger(__name__)


class MetricsFile:
    """Append-only event lines, flushed one by one. A torn last line of a killed process is cut off on opening.

    A failed write (full disk) does not end the training: the line is kept and written with the next one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._size = _cut_torn_line(path)
        self._pending = b""

    def write(self, event: Event) -> str | None:
        """Append one event; returns what went wrong, if anything."""
        self._pending += (to_line(event) + "\n").encode("utf-8")
        descriptor = self._file.fileno()
        try:
            os.ftruncate(descriptor, self._size)
            written = os.write(descriptor, self._pending)
        except OSError as error:
            return f"metrics.jsonl cannot be written: {error.strerror}"
        if written < len(self._pending):
            return "metrics.jsonl cannot be written: the disk is full"
        self._size += written
        self._pending = b""
        return None

    def sync(self) -> None:
        """Force what was written to the device."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def drop_superseded(path: Path, step: int) -> None:
    """Before a run goes on from the checkpoint of `step`: take out what was measured beyond it, as it is done again.

    What tells of the processes themselves (`run_started`, `run_ended`, `warning`) stays. The file is replaced as a
    whole, and only when there is something to take out.

    Raises:
        ResourceError: it cannot be written; the old one stands.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if not _measured_after(line, step)]
    if len(kept) < len(lines):
        atomic.commit_bytes(path, b"".join(kept))


def _measured_after(line: bytes, step: int) -> bool:
    event = from_line(line.decode("utf-8", "replace"))
    return isinstance(event, (StepLogged, Evaluated, PreviewSaved, CheckpointSaved)) and event.step > step


class Recorder:
    """Hands every event to metrics.jsonl and then to each sink; a sink that fails is dropped and training goes on.

    Events may come from several threads; they are recorded one after the other. Without a path there is no file: of
    several processes only the first records.
    """

    def __init__(self, path: Path | None, sinks: Sequence[Sink]) -> None:
        self._file = MetricsFile(path) if path is not None else None
        self._sinks = list(sinks)
        self._failing = False
        self._lock = threading.RLock()

    def emit(self, event: Event) -> None:
        """Record one event."""
        with self._lock:
            self._emit(event)

    def _emit(self, event: Event) -> None:
        problem = self._file.write(event) if self._file is not None else None
        if problem and not self._failing:
            _log.error("%s; training goes on and the lines are kept for later", problem)
        self._failing = problem is not None
        for sink in tuple(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("progress display failed; disabled for the rest of the run")
                self._sinks.remove(sink)

    def sync(self) -> None:
        """Force the metrics to the device."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the metrics file."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Means:
    """What `Window.read` returns: means over the finite steps (NaN where there was none) and counts of the others.

    longest_streak: of steps that were not finite, ending in this window. skipped: such steps so far. steps: of the
    window.
    """

    losses: dict[str, float]
    grad_norm: float
    longest_streak: int
    skipped: int
    skipped_in_window: int
    steps: int


class Window:
    """Sums since the last log, in float64 on the device. Non-finite steps are counted and left out of the sums."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        # [count of finite steps, current streak of others, longest streak, others so far, others before this window]
        self._counts = torch.zeros(5, dtype=torch.float64, device=device)
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor, bad: Tensor) -> None:
        """Add one step: scalar losses, the gradient norm and whether the step was skipped, all on the device."""
        if not self._names:
            self._names = [*losses, "grad_norm"]
            self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        values = torch.stack([*(losses[name].detach() for name in losses), grad_norm]).double()
        self._sums += torch.where(bad, 0.0, values)
        skipped = bad.double()
        finite, streak, longest, total, before = self._counts.unbind()
        streak = (streak + 1) * skipped
        self._counts = torch.stack(
            [finite + 1 - skipped, streak, torch.maximum(longest, streak), total + skipped, before]
        )

    def read(self) -> Means:
        """Means of the window, which starts anew. This is the one place where the host waits for the device."""
        finite, streak, longest, total, before, *sums = torch.cat([self._counts, self._sums]).tolist()
        means = {
            name: value / finite if finite else float("nan") for name, value in zip(self._names, sums, strict=True)
        }
        grad_norm = means.pop("grad_norm", float("nan"))
        self._sums.zero_()
        self._counts = torch.tensor([0, streak, streak, total, total], dtype=torch.float64, device=self._device)
        skipped = int(total - before)
        return Means(means, grad_norm, int(longest), int(total), skipped, int(finite) + skipped)

    def to_json(self) -> dict[str, Any]:
        """The sums as plain numbers, so that a resumed run logs the same means."""
        return {"names": self._names, "counts": self._counts.tolist(), "sums": self._sums.tolist()}

    def load_json(self, value: dict[str, Any]) -> None:
        """Take over what `to_json` returned."""
        self._names = list(value["names"])
        self._counts = torch.tensor(value["counts"], dtype=torch.float64, device=self._device)
        self._sums = torch.tensor(value["sums"], dtype=torch.float64, device=self._device)


@dataclass(frozen=True)
class Pace:
    """Seconds per step, images per second, share of the time spent waiting for data."""

    step_s: float
    images_per_s: float
    data_wait: float


class Stopwatch:
    """Wall time of training steps, and of what interrupts them: evaluations, previews, checkpoints. Monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started = clock()
        self._mark = self.started
        self._steps = 0
        self._waited = self._aside = 0.0
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._interruptions: dict[str, deque[float]] = {}

    @property
    def seconds(self) -> float:
        """Since the stopwatch was made."""
        return self._clock() - self.started

    def waited(self, seconds: float) -> None:
        """Count time that the device stood still for want of data."""
        self._waited += seconds

    def stepped(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    @contextlib.contextmanager
    def interrupted(self, by: str) -> Iterator[None]:
        """Time that is not training: left out of the pace, and remembered for the time left. by: its kind."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._aside += seconds
            self._interruptions.setdefault(by, deque(maxlen=_REMEMBERED)).append(seconds)

    def lap(self, batch_size: int) -> Pace:
        """The pace since the last lap. Call it right after the device was read."""
        now = self._clock()
        elapsed = max(now - self._mark - self._aside, 1e-9)
        step_s = elapsed / max(self._steps, 1)
        self._recent.append(step_s)
        pace = Pace(step_s, self._steps * batch_size / elapsed, min(self._waited / elapsed, 1.0))
        self._mark, self._steps, self._waited, self._aside = now, 0, 0.0, 0.0
        return pace

    def time_left(self, steps: int, interruptions: Mapping[str, int], guesses: Mapping[str, float]) -> float:
        """Estimated seconds to the end: medians of the last laps, and of the last interruptions of each kind.

        Args:
            steps: that are left.
            interruptions: how many are left, by kind.
            guesses: seconds of an interruption of which there was none yet, by kind; 0 for others.
        """
        step_s = statistics.median(self._recent) if self._recent else 0.0
        usual = {**guesses} | {kind: statistics.median(past) for kind, past in self._interruptions.items()}
        return steps * step_s + sum(count * usual.get(kind, 0.0) for kind, count in interruptions.items())


def _cut_torn_line(path: Path) -> int:
    """Truncate after the last line end; returns the size in bytes."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - (1 << 16))
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            file.truncate(position)
        return position
