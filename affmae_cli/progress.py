"""A training run in the terminal: a live view where there is one, plain lines elsewhere. Both are sinks of events.

They run in the trainer's process and only draw what the events say; the view knows nothing of the training. All text
that comes from outside is shown as text, never as markup.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from affmae_cli import output
from affmae_engine.events import Evaluated, Event, RunEnded, RunStarted, StepLogged, SystemSampled, Warned, line

if TYPE_CHECKING:
    from affmae_engine.run_dir import RunDir
    from affmae_engine.train.metrics import Sink
    from affmae_engine.train.task import Task
    from affmae_engine.train.trainer import Trainer

SECONDS_BETWEEN_LINES = 2.0
_SPARKS = "▁▂▃▄▅▆▇█"
_SHOW_CURSOR = b"\x1b[?25h"
_STOPPING = "stopping after this step; Ctrl-C once more leaves at once, without a checkpoint"


@contextlib.contextmanager
def watched_trainer(
    run: RunDir,
    task: Task,
    *,
    data: Path,
    resume: bool = False,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Iterator[Trainer]:
    """A trainer whose progress is shown on stderr, or in the dashboard of the process that started this one.

    Signals are caught, and other processes of the same training are told to join it, inside the block.

    Args:
        run: as for `Trainer`.
        task: as for `Trainer`.
        data: the dataset, which other processes of the same training open too.
        resume: as for `Trainer`.
        quiet: show warnings only.
        tensorboard: write TensorBoard files too.

    Raises:
        ConfigError: TensorBoard files were asked for and the package is missing.
    """
    from affmae_cli.processes import announced
    from affmae_cli.tensorboard_copy import tensorboard_copy
    from affmae_cli.trainer_process import announcer, is_trainer
    from affmae_engine.runtime.signals import StopRequest
    from affmae_engine.train.trainer import Trainer

    with announced(run, task, data, resume=resume), contextlib.ExitStack() as stack:
        sinks: list[Sink] = [stack.enter_context(tensorboard_copy(run))] if tensorboard else []
        stop = StopRequest()
        if is_trainer():
            sinks.insert(0, announcer(run))
        else:
            view = stack.enter_context(watching(output.console(), quiet=quiet))
            sinks.insert(0, view)
            stop = StopRequest(view.on_signal)
        stack.enter_context(stop.installed())
        yield Trainer(run, task, sinks=sinks, resume=resume, stop=stop)


@contextlib.contextmanager
def watching(console: Console, *, quiet: bool = False) -> Iterator[LiveView | PlainLines]:
    """The view that suits the console; `quiet` shows warnings only."""
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield PlainLines(console, quiet=quiet)
        return
    view = LiveView(console)
    with Live(console=console, get_renderable=view.render, refresh_per_second=4, vertical_overflow="crop"):
        yield view


class PlainLines:
    """One line per event; steps no more often than every `interval` seconds, but the last one always."""

    def __init__(self, console: Console, *, quiet: bool = False, interval: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._quiet = quiet
        self._interval = interval
        self._total = 0
        self._printed_at = -interval
        self._held_back: StepLogged | None = None

    def __call__(self, event: Event) -> None:
        """Print what the event says."""
        if isinstance(event, SystemSampled):
            return
        if isinstance(event, RunStarted):
            self._total = event.total_steps
        if self._quiet and not isinstance(event, Warned):
            return
        if isinstance(event, StepLogged) and time.monotonic() - self._printed_at < self._interval:
            self._held_back = event
            return
        if isinstance(event, StepLogged):
            self._printed_at = time.monotonic()
        elif self._held_back is not None:
            self._print(self._held_back)
        self._held_back = None
        self._print(event)

    def on_signal(self, _number: int) -> None:
        """Say that the run is about to stop; safe inside a signal handler."""
        _write(self._console, f"{_STOPPING}\n".encode())

    def _print(self, event: Event) -> None:
        text = line(event, self._total)
        if text:
            style = "yellow" if isinstance(event, Warned) else ""
            self._console.print(Text(output.printable(text), style=style), soft_wrap=True)


class LiveView:
    """State of a run as the events tell it, and its picture."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._overflow: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"
        self._clock = clock
        self._begun = clock()
        self._started: RunStarted | None = None
        self._step: StepLogged | None = None
        self._step_at = self._begun
        self._smooth: dict[str, float] = {}
        self._curve = Curve()
        self._held_out: Evaluated | None = None
        self._best: Evaluated | None = None
        self._ended: RunEnded | None = None
        self._stopping = False
        self._recent: deque[Text] = deque(maxlen=5)

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case RunStarted():
                self._started = event
            case StepLogged():
                self._take_step(event)
            case Evaluated():
                self._held_out = event
                self._best = event if event.best else self._best
            case RunEnded():
                self._ended = event
        if not isinstance(event, (RunStarted, StepLogged, SystemSampled, RunEnded)):
            self._remember(event)

    def on_signal(self, _number: int) -> None:
        """Show that the run is about to stop, and the cursor: a second Ctrl-C leaves no chance to. Handler-safe."""
        self._stopping = True
        _write(self._console, _SHOW_CURSOR)

    def render(self) -> RenderableType:
        """The picture of this moment."""
        if self._started is None:
            return Text("getting ready ...", style="dim")
        parts: list[RenderableType] = [self._title(self._started), self._bar(self._started)]
        parts.append(self._figures() if self._step else Text("waiting for the first steps ...", style="dim"))
        parts.extend(self._recent)
        if self._stopping and self._ended is None:
            parts.append(Text(_STOPPING, style="bold yellow"))
        return Group(*parts)

    def _take_step(self, event: StepLogged) -> None:
        self._step, self._step_at = event, self._clock()
        for name, value in event.losses.items():
            if value == value:
                before = self._smooth.get(name, value)
                self._smooth[name] = before + 0.2 * (value - before)
        if "loss" in self._smooth:
            self._curve.add(self._smooth["loss"])

    def _remember(self, event: Event) -> None:
        text = Text(
            output.printable(line(event, 0)).replace("\n", " "), style="dim", overflow=self._overflow, no_wrap=True
        )
        if isinstance(event, Warned):
            text.style, text.no_wrap = "yellow", False
        self._recent.append(text)

    def _title(self, started: RunStarted) -> Text:
        title = Text(no_wrap=True, overflow=self._overflow)
        title.append(f"{started.task} ", style="bold")
        title.append(output.printable(started.run), style="bold cyan")
        return title.append(f"  {started.parameters / 1e6:.1f} M parameters  {started.device}", style="dim")

    def _bar(self, started: RunStarted) -> Table:
        from affmae_engine.runtime.formatting import duration

        step = max(self._step.step if self._step else 0, started.step)
        if self._ended is not None:
            left, step = duration(self._ended.seconds), max(step, self._ended.step)
            tail = f"{self._ended.status} in {left}"
        elif self._step is not None:
            tail = f"eta {duration(max(0.0, self._step.eta_s - (self._clock() - self._step_at)))}"
        else:
            tail = f"{duration(self._clock() - self._begun)} so far"
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            ProgressBar(total=started.total_steps, completed=step, complete_style="cyan", finished_style="green"),
            Text(f"{step}/{started.total_steps}  {step / started.total_steps:.0%}  {tail}", style="bold"),
        )
        return row

    def _figures(self) -> Table:
        from affmae_engine.runtime.formatting import number, rate

        step = self._step
        assert step is not None
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, min_width=8)
        table.add_column(no_wrap=True, overflow=self._overflow)
        parts = "   ".join(f"{name} {number(self._smooth.get(name, value))}" for name, value in step.losses.items())
        table.add_row("losses", Text(parts.removeprefix("loss "), style="bold"))
        if not self._console.options.ascii_only:
            table.add_row("", Text(self._curve.draw(self._console.width - 12), style="cyan"))
        if self._held_out is not None:
            table.add_row("held-out", self._held_out_text(self._held_out))
        wait = Text(f"waits for data {step.data_wait:.0%}", style="yellow" if step.data_wait > 0.2 else "")
        table.add_row(
            "speed", Text(f"{rate(step.images_per_s)} images/s   {step.step_s:.3g} s a step   ").append_text(wait)
        )
        skipped = f"   {step.skipped} skipped" if step.skipped else ""
        table.add_row(
            "state",
            f"lr {step.lr:.2e}   gradient {number(step.grad_norm)}   memory {step.memory_gib:.1f} GiB "
            f"(at most {step.memory_peak_gib:.1f}){skipped}",
        )
        return table

    def _held_out_text(self, held_out: Evaluated) -> Text:
        from affmae_engine.runtime.formatting import number

        figures = "  ".join(f"{name} {number(value)}" for name, value in held_out.metrics.items())
        text = Text(figures, style="green")
        if self._best is not None:
            text.append(f"  best at {self._best.step}", style="dim")
        return text


class Curve:
    """A number over the whole run in bounded memory: when full, neighbouring points are averaged."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._points: list[float] = []
        self._stride = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Append one value."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._stride:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) == self._capacity:
            self._points = [(a + b) / 2 for a, b in zip(self._points[::2], self._points[1::2], strict=True)]
            self._stride *= 2

    def draw(self, width: int) -> str:
        """The curve in block characters, at most `width` of them; "" while there is nothing to compare."""
        points = self._points
        if len(points) < 2:
            return ""
        count = max(1, min(width, len(points)))
        bins = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
        return sparks([sum(part) / len(part) for part in bins])


def sparks(values: Sequence[float]) -> str:
    """Values as block characters, one each, between the lowest and the highest of them; "" for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def _write(console: Console, data: bytes) -> None:
    """Bytes straight to the console's file: printing is not safe inside a signal handler."""
    with contextlib.suppress(OSError, ValueError):
        os.write(console.file.fileno(), data)
