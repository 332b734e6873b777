"""One picture of a run for `affmae watch --once`: what the dashboard shows, as text for any terminal or file.

Every state is told in words, so nothing is lost without colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from affmae_cli import output
from affmae_cli.dashboard.charts import sparkline
from affmae_cli.dashboard.status import Kind
from affmae_cli.dashboard.text import curve_name, one_line
from affmae_cli.dashboard.verdicts import Level, headline, worst_classes
from affmae_engine.events import line
from affmae_engine.runtime.formatting import duration, number, rate

if TYPE_CHECKING:
    from affmae_cli.dashboard.run_model import RunModel
    from affmae_engine.events import SystemSampled

_STATUS_STYLES: dict[Kind, str] = {
    "waiting": "cyan", "running": "bold green", "stalled": "bold yellow", "finished": "bold green",
    "stopped": "bold yellow", "failed": "bold red", "gone": "bold red",
}  # fmt: skip
_LEVEL_STYLES: dict[Level, str] = {"good": "green", "note": "cyan", "bad": "bold yellow"}
_EVENTS, _LOG_LINES, _CLASSES = 5, 8, 12


def summary(state: RunModel, *, width: int = 80) -> RenderableType:
    """What is known of a run that was polled, for a terminal of that many columns."""
    status = state.status
    head = Text()
    head.append(f"{state.task or 'run'} ", style="bold").append(output.printable(state.root.name), style="bold cyan")
    head.append(f"  {status.kind}", style=_STATUS_STYLES[status.kind])
    parts: list[RenderableType] = [head]
    if state.latest is not None:
        parts.append(Text(output.printable(headline(state).text), style="bold"))
    parts.append(Text(output.printable(status.text)))
    if status.hint:
        parts.append(Text(output.printable(status.hint), style="cyan"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=8)
    table.add_column(overflow="fold")
    for label, text in _rows(state, width):
        table.add_row(label, text)
    if state.problem:
        table.add_row("config", Text(output.printable(state.problem), style="yellow"))
    for index, verdict in enumerate(state.verdicts if state.latest is not None else []):
        table.add_row("verdict" if index == 0 else "", Text(verdict.text, style=_LEVEL_STYLES[verdict.level]))
    events = [(event.time, said) for event in state.events if (said := line(event, state.total_steps))]
    for index, (at, said) in enumerate(events[-_EVENTS:]):
        text = Text(time.strftime("%H:%M:%S  ", time.localtime(at)), style="dim")
        table.add_row("events" if index == 0 else "", text.append(output.printable(said), style="not dim"))
    parts.append(table)
    if status.kind in ("failed", "gone"):
        parts += [Text("end of the log:", style="dim")]
        parts += [Text(output.printable(text)) for text in state.log_tail(1 << 14)[-_LOG_LINES:]]
    return Group(*parts)


def summary_json(state: RunModel) -> dict[str, Any]:
    """The same for scripts."""
    latest = state.latest
    figures = msgspec.structs.asdict(state.system) if state.system else {}
    return {
        "run": state.root,
        "task": state.task,
        "status": state.status.kind,
        "text": state.status.text,
        "step": state.step,
        "total_steps": state.total_steps,
        "elapsed_s": state.elapsed_s,
        "eta_s": state.eta_s,
        "losses": latest.losses if latest else {},
        "held_out": state.evaluated.metrics if state.evaluated else {},
        "per_class": state.evaluated.per_class if state.evaluated else {},
        "images_per_s": latest.images_per_s if latest else math.nan,
        "megapixels_per_s": state.megapixels_per_s,
        "data_wait": state.data_wait,
        "system": {name: value for name, value in figures.items() if name != "time"},
        "headline": headline(state).text,
        "verdicts": [verdict.text for verdict in state.verdicts],
        "preview": preview(state),
    }


def preview(state: RunModel) -> Path | None:
    """The newest picture; None before there is one."""
    return state.root / state.previews[-1].path if state.previews else None


def _rows(state: RunModel, width: int) -> Iterator[tuple[str, Text]]:
    if state.total_steps:
        elapsed, eta = duration(state.elapsed_s), duration(state.eta_s)
        to_go = "" if state.status.ended else f"  {eta} to go"
        yield "step", Text(f"{state.step}/{state.total_steps}  {state.progress:.0%}  {elapsed} so far{to_go}")
    if state.latest is not None:
        yield from _training_rows(state, width)
    if state.evaluated is not None:
        yield from _held_out_rows(state)
    if state.system is not None:
        yield from _machine_rows(state.system)
    if state.previews:
        yield "picture", Text(output.printable(str(preview(state))))


def _training_rows(state: RunModel, width: int) -> Iterator[tuple[str, Text]]:
    latest = state.latest
    assert latest is not None
    losses = "  ".join(f"{curve_name(name)} {number(value)}" for name, value in latest.losses.items())
    yield "losses", Text(losses, style="bold")
    drawn = sparkline(state.steps, "losses.loss", max(10, width - 12))
    if drawn:
        yield "", Text(drawn, style="cyan")
    yield (
        "speed",
        Text(
            f"{rate(latest.images_per_s)} images/s  {_or_dash(state.megapixels_per_s, '.1f')} Mpx/s  "
            f"{latest.step_s:.3g} s a step  waits for data {_or_dash(state.data_wait, '.0%')}"
        ),
    )
    skipped = f"  {latest.skipped} steps skipped" if latest.skipped else ""
    yield "state", Text(f"lr {latest.lr:.2e}  gradient {number(latest.grad_norm)}{skipped}")
    yield "memory", Text(f"{latest.memory_gib:.2f} GiB now, {latest.memory_peak_gib:.2f} at most (this run)")


def _held_out_rows(state: RunModel) -> Iterator[tuple[str, Text]]:
    evaluated, best = state.evaluated, state.best
    assert evaluated is not None
    figures = "  ".join(f"{curve_name(name)} {number(value)}" for name, value in evaluated.metrics.items())
    text = Text(figures, style="green")
    text.append(f"  at step {evaluated.step}")
    if best is not None:
        text.append(f", best at {best.step}")
    yield "held-out", text
    classes = list(evaluated.per_class.items())
    if len(classes) > _CLASSES:
        yield "classes", Text(f"the {_CLASSES} worst of {len(classes)}; --json lists them all", style="dim")
        classes = [(name, evaluated.per_class[name]) for name, _ in worst_classes(state)[:_CLASSES]]
    for index, (name, scores) in enumerate(classes):
        figures = "  ".join(f"{key} {number(value)}" for key, value in scores.items())
        label = "classes" if index == 0 and len(classes) == len(evaluated.per_class) else ""
        yield label, Text(f"{one_line(name)}  {figures}")
    if evaluated.effective_rank:
        ranks = "  ".join(f"stage {stage} {rank:.1f}" for stage, rank in enumerate(evaluated.effective_rank, 1))
        yield "ranks", Text(ranks)


def _machine_rows(system: SystemSampled) -> Iterator[tuple[str, Text]]:
    if not system.gpu_missing:
        others = f", others {system.gpu_memory_others:.1f}" if math.isfinite(system.gpu_memory_others) else ""
        yield "GPU", Text(output.printable(system.gpu))
        yield (
            "",
            Text(
                f"{_or_dash(system.gpu_memory_used, '.1f')} of {_or_dash(system.gpu_memory_total, '.1f')} GiB"
                f"{others}  load {_or_dash(system.gpu_utilisation, '.0%')}  {_or_dash(system.power, '.0f')} of "
                f"{_or_dash(system.power_limit, '.0f')} W  {_or_dash(system.temperature, '.0f')} °C"
            ),
        )
        held = f"  throttled: {', '.join(system.throttled)}" if system.throttled else ""
        yield (
            "",
            Text(f"clocks {_or_dash(system.sm_clock, '.0f')} and {_or_dash(system.memory_clock, '.0f')} MHz{held}"),
        )
    yield (
        "machine",
        Text(
            f"memory {_or_dash(system.host_memory_used, '.1f')} of {_or_dash(system.host_memory_total, '.1f')} GiB "
            f"(trainer {_or_dash(system.process_memory, '.1f')})  CPU load {_or_dash(system.cpu, '.0%')}"
        ),
    )


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
