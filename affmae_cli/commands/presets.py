"""`affmae presets`: what there is, and what one of them resolves to for each task."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption


def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Preset to show in full.")] = None,
    task: Annotated[
        Literal["pretrain", "finetune"] | None, typer.Option("--task", help="Show only what this command would use.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the presets, or show one of them."""
    output.show("")
