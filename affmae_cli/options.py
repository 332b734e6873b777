"""Options that several commands share, as annotated types, so that each help text exists once.

Options that set a field of the configuration are passed to `settings.resolve` as `flags`, by their names in
`settings.FLAGS`. All other fields are set with `--set` and have no flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _complete_preset(incomplete: str) -> list[str]:
    from affmae_cli.preset_files import preset_names

    return [name for name in (*preset_names(), "auto") if name.startswith(incomplete)]


_SETTINGS = "Settings"

PresetOption = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Settings for a GPU and purpose; see `affmae presets`. `auto` picks by the GPU found.",
        autocompletion=_complete_preset,
        rich_help_panel=_SETTINGS,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file that overrides the preset.", rich_help_panel=_SETTINGS),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Set any field, such as optim.lr=1e-4; `none` clears an optional one. May be repeated.",
        rich_help_panel=_SETTINGS,
    ),
]
TaskOption = Annotated[
    Literal["pretrain", "finetune"] | None, typer.Option("--task", help="Show only what this command would use.")
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Length of the run in optimizer steps.", rich_help_panel=_SETTINGS)
]
EpochsOption = Annotated[
    float | None, typer.Option("--epochs", help="Length of the run in passes over the data.", rich_help_panel=_SETTINGS)
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="auto|N",
        help="Images per forward pass on one device; `auto` measures what fits. It changes memory and speed, and the "
        "result only by rounding and by what dropout draws: `train.batch_size` stays the batch of a step.",
        rich_help_panel=_SETTINGS,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of weights, samples, masks and augmentation.", rich_help_panel=_SETTINGS),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option("--device", help="Where to compute; `auto` takes the GPU if there is one."),
]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="PATH", help="Where to write; by default a new name.")
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "-m",
        "--model",
        metavar="RUN",
        help="Run, checkpoint, weights file, model package or hf:ORG/NAME; by default the newest finished run.",
    ),
]


def _trust(ctx: typer.Context, wanted: bool) -> bool:
    if wanted:
        from affmae_engine.data.readers.limits import trusted_sizes

        ctx.with_resource(trusted_sizes())
    return wanted


TrustSizesOption = Annotated[
    bool,
    typer.Option("--trust-sizes", help="Skip limits on size and compression (trusted files only).", callback=_trust),
]


def _read_channel(ctx: typer.Context, value: int | None) -> int | None:
    if value is not None:
        from affmae_engine.data.readers.source import reading_as

        ctx.with_resource(reading_as(channel=value))
    return value


def _read_axes(ctx: typer.Context, value: str | None) -> str | None:
    if value:
        from affmae_engine.data.readers.source import reading_as

        ctx.with_resource(reading_as(axes=value))
    return value


ChannelOption = Annotated[
    int | None,
    typer.Option("--channel", min=0, help="Channel of multi-channel images, counted from 0.", callback=_read_channel),
]
AxesOption = Annotated[
    str | None,
    typer.Option(
        "--axes",
        metavar="LETTERS",
        help="What the axes of the files are, in place of what these say: one of z, y, x, c, t each, such as yxz.",
        callback=_read_axes,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
ResumeOption = Annotated[
    Path | None,
    typer.Option("--resume", metavar="RUN", help="Resume RUN from its last checkpoint, with its settings."),
]
InitFromOption = Annotated[
    Path | None,
    typer.Option("--init-from", metavar="RUN", help="Start from these weights: run, model package, hf:ORG/NAME."),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check the data, print the settings, the length and the memory of the run, and stop."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print only the result, warnings and errors.")]
NoTuiOption = Annotated[bool, typer.Option("--no-tui", help="Show a small progress view instead of the dashboard.")]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Write TensorBoard files to RUN/tensorboard as well.")
]
