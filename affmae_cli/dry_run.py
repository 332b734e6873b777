"""Prints resolved settings (`affmae presets`), and what a run would do with them (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from affmae_cli.output import print_json, printable, show, toml_value

if TYPE_CHECKING:
    from affmae_cli.settings import Resolved
    from affmae_engine.train.plan import RunPlan


def show_config(resolved: Resolved, *, as_json: bool = False) -> None:
    """Print resolved settings to stdout: TOML with the source of every value that is not a default, or JSON."""
    if as_json:
        print_json(_record(resolved))
        return
    title = f"affmae {resolved.task}, preset {resolved.preset}" if resolved.task else f"preset {resolved.preset}"
    show(f"# {title}\n\n{config_toml(resolved.config.model_dump(), resolved.sources)}")


def show_dry_run(resolved: Resolved, plan: RunPlan, *, as_json: bool = False) -> None:
    """Print resolved settings and, as comments, what the run would do; with `as_json` one document of both."""
    if as_json:
        print_json({**_record(resolved), "plan": asdict(plan)})
        return
    show_config(resolved)
    lines = ["what this run would do; nothing was written", *_plan_lines(plan, resolved)]
    show("\n" + "".join(f"# {_comment(line)}\n" for line in lines))


def _record(resolved: Resolved) -> dict[str, Any]:
    return {
        "task": resolved.task,
        "preset": resolved.preset,
        "config": resolved.config.model_dump(mode="json"),
        "sources": resolved.sources,
    }


def _plan_lines(plan: RunPlan, resolved: Resolved) -> list[str]:
    from affmae_engine.errors import human_bytes

    if plan.steps is None:
        length = f"{plan.epochs:g} epochs"
    else:
        length = f"{plan.steps:,} steps of {resolved.config.train.batch_size} images"
        if plan.epochs is not None:
            length += f", {plan.epochs:,.1f} epochs of {plan.samples_per_epoch:,} crops"
    return [
        f"data: {plan.data or 'none given'}",
        f"length: {length}",
        f"device: {plan.device}",
        f"network: {plan.parameters / 1e6:.3g} M parameters, {plan.micro_batch} images at a time",
        f"memory: about {human_bytes(plan.memory_bytes)} (estimate); {human_bytes(plan.free_bytes)} are free",
        *(f"note: {note}" for note in plan.notes),
    ]


def config_toml(sections: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str], *, prefix: str = "") -> str:
    """Sections of a configuration as TOML, with the source of a value as a comment where `sources` has one.

    Args:
        sections: field values by section and field name; None becomes a comment, as TOML has no such value.
        sources: source by "section.field".
        prefix: put before each table's name, for example "task.finetune.".
    """
    tables = []
    for section, values in sections.items():
        lines = [f"[{prefix}{section}]"]
        for name, value in values.items():
            line = f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"
            source = sources.get(f"{section}.{name}")
            lines.append(f"{line:<40}  # {_comment(source)}" if source else line)
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _comment(text: str) -> str:
    """Text for one line of comment; file names may have line ends."""
    return printable(text).replace("\n", "\\n")
