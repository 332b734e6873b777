"""`affmae watch`: the dashboard on any run, live or finished; or one summary of it; or a picture of its screen."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.dashboard.control import Pictures
from affmae_cli.options import JsonOption
from affmae_engine.errors import ConfigError, InputError

DEFAULT_FOLDER = Path("runs")
Screen = Literal["overview", "metrics", "pictures", "system", "log", "config", "runs"]


def watch(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run or folder of runs, also on another machine as user@host:runs. By default the newest live run.",
            show_default=str(DEFAULT_FOLDER),
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one summary and exit.")] = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Save the screen as .svg or .png (by the suffix) and exit."),
    ] = None,
    size: Annotated[str, typer.Option("--size", metavar="COLUMNSxROWS", help="Size of the saved screen.")] = "160x48",
    screen: Annotated[Screen, typer.Option("--screen", help="Tab to save.")] = "overview",
    notify: Annotated[
        str,
        typer.Option(
            "--notify",
            metavar="COMMAND",
            help="Start COMMAND with a message as its last argument when the run finishes, stalls, diverges or has a "
            "loss that is not finite.",
        ),
    ] = "",
    pictures: Annotated[
        Pictures,
        typer.Option(
            "--pictures", help="Pixels where the terminal has them (needs the extra `pictures`), or always half blocks."
        ),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Watch a run: what it has learned, losses, speed, GPU, pictures, events.

    It only reads the run's directory: on this machine, on a mounted disk or over ssh. Leaving it does not affect the
    training.
    """
    # Everything that can be wrong with the options is said before anything is read.
    columns_rows = _parse_size(size)
    command = _parse_command(notify)
    terminal = os.environ.get("TERM", "dumb") != "dumb" and all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)
    )
    if not (terminal or once or export or json):
        raise ConfigError("the dashboard needs a terminal", "--once prints a summary, --export saves a picture")
    if export is not None:
        from affmae_cli.dashboard.export import check_suffix

        check_suffix(export)
    with _local(run) as named:
        root, several = _find(named, ask=not (once or export or json))
        if once or json:
            _print(root, as_json=json)
        if export is not None:
            from affmae_cli.dashboard.app import export_screen

            export_screen(root, export, size=columns_rows, screen=screen)
            (output.say if json else output.show)(f"{export}")  # beside JSON, nothing else is a result
        if not (once or export or json):
            from affmae_cli.dashboard.app import run_dashboard

            run_dashboard(root, pictures=pictures, notify=command, tab="runs" if several else "overview")


@contextlib.contextmanager
def _local(run: str | None) -> Iterator[Path | None]:
    """Where the run or the folder of runs is on this machine; one on another machine is copied while it is watched."""
    from affmae_cli.dashboard.remote import Remote, mirrored

    remote = Remote.parse(run) if run is not None and not Path(run).exists() else None
    if remote is None:
        yield Path(run) if run is not None else None
        return
    with mirrored(remote) as folder:
        yield folder


def _print(root: Path, *, as_json: bool) -> None:
    from affmae_cli.dashboard.run_model import RunModel
    from affmae_cli.run_summary import summary, summary_json

    model = RunModel(root)
    model.poll()
    while model.opening:
        model.poll()
    if as_json:
        output.print_json(summary_json(model))
    else:
        output.show(summary(model, width=output.console().width))


def _find(named: Path | None, *, ask: bool) -> tuple[Path, bool]:
    """The run that is meant, and whether several may be: the one named, or of a folder the newest live one, else the
    newest.

    Raises:
        InputError: there is no such run; the hint names near ones.
        ConfigError: several are live and nobody can be asked.
    """
    from affmae_cli.dashboard.runs import RunsFolder
    from affmae_engine.run_dir import list_runs, open_run

    folder = named or DEFAULT_FOLDER
    if named is not None and ((named / "config.toml").is_file() or not list_runs(named)):
        return open_run(named).root, False
    runs = RunsFolder(folder).runs()
    if not runs:
        raise InputError(f"no runs in {folder}", "name one: affmae watch RUN; `affmae pretrain` makes them")
    live = [model for model in runs if not model.status.ended]
    if len(live) > 1 and not ask:
        names = ", ".join(str(model.root) for model in live)
        raise ConfigError(f"{len(live)} runs are live: {names}", "name the one to watch")
    return (live or runs)[0].root, len(live) > 1


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,3})x(\d{2,3})", text)
    if match is None:
        raise ConfigError(f"--size {text} is not COLUMNSxROWS", "for example --size 160x48")
    return int(match[1]), int(match[2])


def _parse_command(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"--notify {text}: {error}", "quote it as for a shell, for example --notify 'notify-send'"
        ) from error
