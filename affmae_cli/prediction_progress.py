"""Progress of a prediction on stderr: a bar with sections, tiles a second and ETA, or a plain line now and then."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from affmae_cli import output

if TYPE_CHECKING:
    from affmae_engine.predict.files import Refused
    from affmae_engine.predict.finish import PredictReport
    from affmae_engine.predict.run import PredictProgress

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def showing(images: int, *, quiet: bool = False) -> Iterator[PredictionView]:
    """The view that suits stderr; `quiet` shows warnings only."""
    console = output.console()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield PredictionView(images, None, quiet=quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[sections]}  {task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield PredictionView(images, bar)


class PredictionView:
    """Shows one image at a time: how far it is, what was warned about, what was passed over."""

    def __init__(
        self,
        images: int,
        bar: Progress | None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images, self._bar, self._quiet, self._clock = images, bar, quiet, clock
        self._done = self._first = 0
        self._task: TaskID | None = None
        self._begun = self._printed = 0.0

    def progress(self, event: PredictProgress) -> None:
        """After a batch of tiles."""
        now = self._clock()
        if self._begun == 0.0:  # the first batch warms up; speed counts from its end
            self._begun = self._printed = now
            self._first = event.tiles_done
        spent, counted = now - self._begun, event.tiles_done - self._first
        speed = f"{counted / spent:.1f} tiles/s" if counted and spent > 0 else ""
        sections = f"{event.sections_done}/{event.sections} sections"
        if self._bar is not None:
            if self._task is None:
                title = f"[{self._done + 1}/{self._images}] {event.name}" if self._images > 1 else event.name
                self._task = self._bar.add_task(output.printable(title), total=event.tiles, sections="", rate="")
            self._bar.update(self._task, completed=event.tiles_done, sections=sections, rate=speed)
        elif not self._quiet and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            left = spent / max(1, counted) * (event.tiles - event.tiles_done)
            output.say(f"{event.name}: {sections}, {event.tiles_done}/{event.tiles} tiles, {speed}, eta {left:.0f} s")

    def report(self, report: PredictReport) -> None:
        """One image is done."""
        for text in report.warnings:
            output.say(text, label="warning", style="bold yellow")
        if not self._quiet:
            for text in report.notes:
                output.say(text, label="note", style="cyan")
            if self._images > 1:
                output.say(f"{report.source} -> {report.labels} ({report.seconds:.1f} s)")
        self._next()

    def refused(self, problem: Refused) -> None:
        """One image was passed over."""
        output.say(problem.reason, label="passed over", style="bold yellow")
        self._next()

    def on_signal(self, _number: int) -> None:
        """Say that the work is about to stop; safe inside a signal handler."""
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this batch; what is done is kept; Ctrl-C once more leaves at once\n")

    def _next(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._begun = None, 0.0
        self._done += 1
