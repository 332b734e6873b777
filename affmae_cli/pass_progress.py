"""Progress of work that goes over the blocks of a volume, in one pass or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from affmae_cli import output


@contextmanager
def showing_passes(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show passes on stderr: a bar in a terminal, else a line when a pass begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = output.console()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        last = ""

        def line(name: str, done: int, total: int) -> None:
            nonlocal last
            if not quiet and total > 1 and name != last:
                output.say(f"{name}: {done} of {total} blocks done")
            last = name

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, int] = {}

        def move(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)  # type: ignore[arg-type]  # rich's own type for an int

        yield move
