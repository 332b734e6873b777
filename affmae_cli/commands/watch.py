"""`affmae watch`: the dashboard on any run, live or finished; or one summary of it; or a picture of its screen."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.dashboard.result import Pictures
from affmae_cli.options import JsonOption
from affmae_engine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from affmae_cli.dashboard.runs import RunRow

DEFAULT_FOLDER = Path("runs")
Screen = Literal["overview", "curves", "pictures", "system", "log", "config", "runs"]


def watch(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, or a folder of runs; by default the newest live one.",
            show_default=str(DEFAULT_FOLDER),
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one summary and leave.")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="OUT.svg", help="Save the screen and leave.")
    ] = None,
    size: Annotated[str, typer.Option("--size", metavar="COLUMNSxROWS", help="Size of the saved screen.")] = "160x48",
    screen: Annotated[Screen, typer.Option("--screen", help="Which tab to save.")] = "overview",
    pictures: Annotated[
        Pictures,
        typer.Option(
            "--pictures", help="Pixels where the terminal has them (needs the extra `pictures`), or always half blocks."
        ),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Watch a run: losses, speed, card, pictures, events.

    It only reads the run's directory: on this machine or on a mounted disk, and leaving it never touches the training.
    """
    columns_rows = _parse_size(size)
    terminal = os.environ.get("TERM", "dumb") != "dumb" and all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)
    )
    if not (terminal or once or export or json):
        raise ConfigError("the dashboard needs a terminal", "--once prints a summary, --export saves a picture")
    root = _find(run, ask=terminal and not (once or export or json))
    if once or json:
        _print(root, as_json=json)
    if export is not None:
        from affmae_cli.dashboard.app import export_screen

        export_screen(root, export, size=columns_rows, screen=screen)
        (output.say if json else output.show)(f"{export}")  # beside JSON, nothing else is a result
    if not (once or export or json):
        from affmae_cli.dashboard.app import run_dashboard

        run_dashboard(root, pictures=pictures)


def _print(root: Path, *, as_json: bool) -> None:
    from affmae_cli.dashboard.reader import RunReader
    from affmae_cli.run_summary import summary, summary_json

    reader = RunReader(root)
    reader.poll()
    while reader.behind:
        reader.poll()
    if as_json:
        output.print_json(summary_json(reader))
    else:
        output.show(summary(reader, width=output.console().width))


def _find(named: Path | None, *, ask: bool) -> Path:
    """The run that is meant: the one named; of a folder the live one, one of several chosen, or the newest.

    Raises:
        InputError: there is no such run; the hint names near ones.
        ConfigError: several are live and nobody can be asked.
    """
    from affmae_cli.dashboard.runs import RunsFolder
    from affmae_engine.run_dir import list_runs, open_run

    folder = named or DEFAULT_FOLDER
    if named is not None and not (list_runs(named) and not (named / "config.toml").is_file()):
        return open_run(named).root
    rows = RunsFolder(folder).rows()
    if not rows:
        raise InputError(f"no runs in {folder}", "name one: affmae watch RUN; `affmae pretrain` makes them")
    live = [row for row in rows if row.live]
    if len(live) <= 1:
        return (live or rows)[0].root
    if not ask:
        names = ", ".join(str(row.root) for row in live)
        raise ConfigError(f"{len(live)} runs are live: {names}", "name the one to watch")
    return _choose(live)


def _choose(live: list[RunRow]) -> Path:
    from rich.table import Table
    from rich.text import Text

    from affmae_engine.runtime.formatting import duration, number

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "run", "task", "state", "step", "loss", "last event"):
        table.add_column(column)
    for index, row in enumerate(live, 1):
        step = f"{row.step}/{row.total_steps}"
        cells = (f"{index}", output.printable(str(row.root)), row.task, row.status.kind, step, number(row.loss))
        table.add_row(*map(Text, (*cells, f"{duration(row.age_s)} ago")))
    output.console().print(table)
    while True:
        chosen = typer.prompt("Which one?", type=int, default=1)
        if 1 <= chosen <= len(live):
            return live[chosen - 1].root
        output.say(f"there is no number {chosen}", label="error", style="bold red")


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,3})x(\d{2,3})", text)
    if match is None:
        raise ConfigError(f"--size {text} is not COLUMNSxROWS", "for example --size 160x48")
    return int(match[1]), int(match[2])
