"""`affmae presets`: what there is, and what one of them resolves to for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from affmae_cli import dry_run, output
from affmae_cli.options import JsonOption, TaskOption

if TYPE_CHECKING:
    from affmae_cli.settings import Resolved


def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Preset to show in full.")] = None,
    task: TaskOption = None,
    json: JsonOption = False,
) -> None:
    """List the presets, or show one of them with all its values."""
    from affmae_cli import settings

    if name is None:
        if task is not None:
            raise typer.BadParameter("--task needs the NAME of a preset")
        _show_list(json)
        return
    shown = settings.resolve(task, preset=name, environ={})
    if json or task:
        dry_run.show_config(shown, as_json=json)
        return
    dry_run.show_config(shown)
    for each in settings.TASKS:
        overlay = _overlay(shown, settings.resolve(each, preset=name, environ={}))
        if overlay:
            output.show(f"\n# what {each} changes\n\n{overlay}")


def _overlay(base: Resolved, special: Resolved) -> str:
    """The sections of a task's configuration that differ from the base, as `[task.NAME.SECTION]` tables."""
    plain = base.config.model_dump()
    changed: dict[str, dict[str, Any]] = {}
    for section, values in special.config.model_dump().items():
        different = {key: value for key, value in values.items() if value != plain[section][key]}
        if different:
            changed[section] = different
    return dry_run.config_toml(changed, special.sources, prefix=f"task.{special.task}.") if changed else ""


def _show_list(json: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from affmae_cli import preset_files, settings

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("preset", "GPU", "size", "crop", "batch", "for"):
        table.add_column(title, no_wrap=title != "for")
    records = []
    for preset in preset_files.list_presets():
        config = settings.resolve("pretrain", preset=preset.name, environ={}).config
        batch, micro = config.train.batch_size, config.train.micro_batch
        records.append(
            {
                "name": preset.name,
                "about": preset.about,
                "card_gb": preset.card_gb,
                "size": config.model.size,
                "crop_size": config.data.crop_size,
                "batch_size": batch,
                "micro_batch": micro,
            }
        )
        card = f"{preset.card_gb:g} GB" if preset.card_gb else "-"
        pieces = f" ({batch // micro} x {micro})" if isinstance(micro, int) and micro != batch else ""
        batch_text = f"{batch}{pieces}"
        row = (preset.name, card, config.model.size, str(config.data.crop_size), batch_text, preset.about)
        table.add_row(*map(Text, row))
    if json:
        output.print_json(records)
        return
    output.show(table)
