"""The `affmae` command: registers the commands, in the order of the help, and nothing else.

Command modules import only Typer and the option types at the top; the engine is imported when a command runs, so that
`affmae --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from affmae_cli import output
from affmae_cli.commands import (
    bench,
    check,
    demo,
    doctor,
    finetune,
    import_,
    ingest,
    measure,
    objects,
    predict,
    presets,
    pretrain,
    share,
    slurm,
    watch,
)
from affmae_cli.errors import ErrorGroup, report
from affmae_cli.processes import led
from affmae_engine.errors import ResourceError
from affmae_engine.platforms import require_supported

STORY = """
Pretraining and segmentation for electron microscopy.

[bold]affmae demo[/bold]                               all of it, on a made-up specimen
[bold]affmae ingest scans/[/bold]                      collect images and stacks, once
[bold]affmae pretrain -o runs/em[/bold]                learn from them, without labels
[bold]affmae finetune --images I --labels L --init-from runs/em -o runs/seg[/bold]
[bold]affmae predict stack.tif -m runs/seg[/bold]      segment a stack of any size
[bold]affmae watch[/bold]                              see how a run is doing
"""

ORDER = (
    "ingest", "pretrain", "finetune", "predict", "objects", "measure", "watch", "demo", "bench", "check", "share",
    "import", "slurm", "presets", "doctor",
)  # fmt: skip
"""The commands in the order of the help."""


class RootGroup(ErrorGroup):
    """The root command, which lists its commands in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(ORDER)


app = typer.Typer(
    cls=RootGroup,
    help=STORY,
    invoke_without_command=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(ingest.ingest)
app.command()(led(pretrain.pretrain))
app.command()(led(finetune.finetune))
app.command()(predict.predict)
app.command()(objects.objects)
app.command()(measure.measure)
app.command()(watch.watch)
app.command()(demo.demo)
app.add_typer(bench.app, name="bench")
app.command()(check.check)
app.command()(share.share)
app.command("import")(import_.import_)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(slurm.slurm)
app.command()(presets.presets)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        output.show(f"affmae {version('affmae')}")
    except PackageNotFoundError:
        output.show("affmae (run from a source folder, not installed)")
    raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Without a command: the start screen in a terminal, the help elsewhere."""
    if ctx.invoked_subcommand is not None:
        return
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if os.environ.get("TERM", "dumb") == "dumb" or not all(s is not None and s.isatty() for s in streams):
        output.show(ctx.get_help().rstrip())
        raise typer.Exit(2)
    from affmae_cli.dashboard.home import COMMANDS, home

    functions = {
        info.name or info.callback.__name__: info.callback for info in app.registered_commands if info.callback
    }
    home({name: functions[name] for name in COMMANDS.values() if name in functions})


def main() -> None:
    """Entry point of the console script and of `python -m affmae_cli`."""
    # Threads of the CPU backend (libgomp) spin long while they wait, unless told otherwise before torch is loaded, and
    # two such processes stall each other. A short spin costs nothing on an idle machine (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    output.prepare_streams()
    try:
        require_supported()
    except ResourceError as error:
        report(error)
        raise SystemExit(error.exit_code) from error
    app(prog_name="affmae")
