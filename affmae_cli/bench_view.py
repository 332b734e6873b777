"""A running comparison in the terminal: a table whose rows fill in, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from affmae_cli import output
from affmae_engine.bench.comparison import Clock, Outcome
from affmae_engine.bench.report import figure
from affmae_engine.bench.results import Result, ratios_of, result_of
from affmae_engine.train.report import duration

_COLUMNS = ("task", "px", "network", "images", "step ms", "images/s", "Mpx/s", "peak GiB", "", "")
_RIGHT = {"px", "images", "step ms", "images/s", "Mpx/s", "peak GiB"}


class View:
    """Knows the outcomes and the clock once `follow` was called; is told of every change."""

    def __init__(self) -> None:
        self.outcomes: Sequence[Outcome] = ()
        self.clock: Clock | None = None

    def follow(self, outcomes: Sequence[Outcome], clock: Clock) -> None:
        """What is to be shown from now on."""
        self.outcomes, self.clock = outcomes, clock

    def tell(self, text: str) -> None:
        """Something that happens before or beside the cases."""

    def changed(self, outcome: Outcome) -> None:
        """An outcome has changed."""


class PlainLines(View):
    """One line when a process begins, and one with its figures."""

    def tell(self, text: str) -> None:
        """A line."""
        output.say(text)

    def changed(self, outcome: Outcome) -> None:
        """A line, unless the case waits."""
        if outcome.doing == "waiting":
            return
        left = f", about {duration(self.clock.left_s)} left" if self.clock and self.clock.total else ""
        if outcome.doing:
            output.say(f"{outcome.doing}: {outcome.case.title}{left}")
        elif outcome.last is not None:
            output.say(f"  {outcome.case.title}: {described(result_of(outcome))}")


class LiveTable(View):
    """The whole table, drawn again and again."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console, self._message = console, ""

    def tell(self, text: str) -> None:
        """A line under the table, in the place of the last one."""
        self._message = text

    def changed(self, outcome: Outcome) -> None:
        """What is said of a case replaces the line under the table."""
        if outcome.doing and outcome.doing != "waiting":
            self._message = f"{outcome.doing}: {outcome.case.title}"

    def render(self) -> RenderableType:
        """The picture of this moment."""
        parts: list[RenderableType] = []
        if self.outcomes:
            parts.append(self._table())
        if self.clock is not None and self.clock.total:
            parts.append(_bar(self.clock))
        overflow: OverflowMethod = "crop" if self._console.options.ascii_only else "ellipsis"
        parts.append(Text(output.printable(self._message), style="dim", no_wrap=True, overflow=overflow))
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=True)
        results = [result_of(outcome) for outcome in self.outcomes]
        speeds = {(r.work, r.size, r.resolution, r.batch): r.speed for r in ratios_of(results)}
        for outcome, result in zip(self.outcomes, results, strict=True):
            case, ok = result.case, result.status == "ok"
            speed = speeds.get((case.work, case.size, case.resolution, case.batch))
            faster = f"{figure(speed)} x" if speed and case.model == "affmae" else ""
            state = outcome.doing if outcome.doing else "" if ok else result.status
            table.add_row(
                case.work, str(case.resolution), f"{case.model} {case.size}", str(case.batch),
                figure(result.ms), figure(result.images_per_s), figure(result.mpx_per_s), figure(result.allocated_gib),
                Text(faster, style="bold green"), Text(state, style="dim" if ok or outcome.doing else "bold yellow"),
            )  # fmt: skip
        return table


@contextlib.contextmanager
def showing(*, quiet: bool) -> Iterator[View]:
    """The view that suits the terminal; `quiet` shows nothing."""
    console = output.console()
    if quiet:
        yield View()
    elif not console.is_terminal or console.is_dumb_terminal:
        yield PlainLines()
    else:
        view = LiveTable(console)
        with Live(console=console, get_renderable=view.render, refresh_per_second=4, vertical_overflow="crop"):
            yield view


def described(result: Result) -> str:
    """A case's figures on one line."""
    if result.status != "ok":
        return f"{result.status} ({result.note})" if result.note else result.status
    memory = f", {figure(result.allocated_gib)} GiB" if result.allocated_gib else ""
    return f"{figure(result.ms)} ms, {figure(result.images_per_s)} images/s{memory}"


def _bar(clock: Clock) -> Table:
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    finished = clock.done >= clock.total
    tail = f"in {duration(clock.elapsed_s)}" if finished else f"about {duration(clock.left_s)} left"
    row.add_row(
        ProgressBar(total=clock.total, completed=clock.done, complete_style="cyan", finished_style="green"),
        Text(f"{clock.done}/{clock.total}  {tail}", style="bold"),
    )
    return row
