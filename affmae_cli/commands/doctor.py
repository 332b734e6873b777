"""`affmae doctor`: what this machine can do, which kernels run on it, and whether they compute right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affmae_cli import output
from affmae_cli.options import ConfigOption, DeviceOption, JsonOption, SetOption
from affmae_engine.errors import AffmaeError

if TYPE_CHECKING:
    from rich.table import Table

    from affmae_engine.doctor.diagnosis import Diagnosis
    from affmae_engine.doctor.machine import Card, Machine
    from affmae_engine.doctor.selfcheck import Check

RUNS = Path("runs")
_STYLES = {"ready": "bold green", "slow": "bold yellow", "failed": "bold red"}
_BACKENDS = {"triton": "Triton", "reference": "PyTorch", None: "nothing"}


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Skip the timings.")] = False,
    device: DeviceOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Show what this machine can do, and check that its kernels compute correctly.

    Small random cases of every operation, forward and backward, are compared with exact results. Exits with 1 if one of
    them is wrong.
    """
    from affmae_cli import settings
    from affmae_engine.doctor.diagnosis import diagnose

    resolved = settings.resolve(None, preset="em-base", config_file=config, overrides=set_, flags={"device": device})
    with _steps(quiet=json) as on_step:
        found = diagnose(resolved.config, quick=quick, runs=RUNS, on_step=on_step)
    if json:
        output.print_json(found.document() | {"preset": _preset(found.card)})
    else:
        _show(found)
    if found.status == "failed":
        raise _error(found)


@contextmanager
def _steps(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only."""
    if quiet or not output.console().is_terminal:
        yield lambda step: None
        return
    with output.console().status("") as status:
        yield lambda step: status.update(f"{step} ...")


def _error(found: Diagnosis) -> AffmaeError:
    """What is wrong, in one line, and what to do about it."""
    unable = [operation for operation in found.operations if operation.backend is None]
    if unable:
        return AffmaeError(
            f"{', '.join(operation.operation for operation in unable)} cannot run as requested: {unable[0].reason}",
            "use --set kernels.backend=auto",
        )
    backends = {operation.operation: operation.backend for operation in found.operations}
    parts = []
    for check in found.checks:
        if check.ok:
            continue
        name = f"{check.operation} ({_BACKENDS[backends[check.operation]]}, {check.precision})"
        if check.error is None:
            parts.append(f"{name} fails: {check.failure}")
        else:
            parts.append(f"{name} is wrong: {check.tensor} is off by {_error_text(check.error)}")
    kernels = any(backends[name] == "triton" for name in found.wrong)
    hint = "use --set kernels.backend=reference" if kernels else "reinstall PyTorch, try --device cpu"
    return AffmaeError("; ".join(parts), f"{hint} and report it, with what `affmae doctor --json` prints")


def _show(found: Diagnosis) -> None:
    from rich.text import Text

    output.show(Text(found.verdict, style=_STYLES[found.status]))
    if found.remark:
        output.show(Text(output.printable(found.remark)))
    for title, table in (_machine(found), _operations(found), _checks(found), _timings(found)):
        if table.row_count:
            output.show("")
            output.show(Text(title, style="bold"))
            output.show(table)
        if table.row_count and table.columns[-1].header == "runs as":
            _show_reasons(found)
    for timing in found.timings:
        if timing.failure:
            output.show(f"{timing.operation}, {timing.shape} could not be timed: {output.printable(timing.failure)}")


def _show_reasons(found: Diagnosis) -> None:
    """Why each operation runs as it does; one line when the reason is the same for all."""
    from rich.text import Text

    by_reason: dict[str, list[str]] = {}
    for operation in found.operations:
        by_reason.setdefault(operation.reason, []).append(operation.operation)
    for reason, names in by_reason.items():
        of = f" of {', '.join(names)}" if len(by_reason) > 1 else ""
        output.show(Text(f" The reason{of}: {output.printable(reason)}"))


def _machine(found: Diagnosis) -> tuple[str, Table]:
    machine = found.machine
    table = _table("", "")
    rows: dict[str, str] = {}
    for card in machine.cards:
        rows["card" if len(machine.cards) == 1 else f"card {card.index}"] = _card(card)
    if not machine.cards:
        rows["card"] = machine.problems.get("card", "none")
    driver = machine.driver or machine.problems.get("driver", "")
    if driver:
        rows["driver"] = driver
    rows["CUDA"] = f"{machine.cuda_runtime} (in PyTorch)" if machine.cuda_runtime else "not in this PyTorch"
    rows["processors"] = str(machine.cpus or machine.problems.get("processors", "unknown"))
    rows["memory"] = _memory(machine.ram_bytes, machine.ram_free_bytes) or machine.problems.get("memory", "unknown")
    rows["disk"] = _disk(machine)
    rows["system"] = machine.platform or machine.problems.get("platform", "unknown")
    rows |= {f"extra {extra}": _extra(extra, names) for extra, names in machine.extras.items() if names}
    rows["versions"] = ", ".join(f"{name} {number or 'not installed'}" for name, number in machine.versions.items())
    rows["preset"] = f"{_preset(found.card)} (what `affmae pretrain` takes by itself)"
    rows["tried on"] = found.device
    for name, value in rows.items():
        _add(table, f" {name}", value)
    return "This machine", table


def _operations(found: Diagnosis) -> tuple[str, Table]:
    table = _table("operation", "what it does", "runs as")
    for operation in found.operations:
        style = {"triton": "green", "reference": "", None: "red"}[operation.backend]
        _add(table, operation.operation, operation.about, (_BACKENDS[operation.backend], style))
    return "Which kernels run", table


def _checks(found: Diagnosis) -> tuple[str, Table]:
    """The largest error of every operation, one column per precision."""
    precisions = list(dict.fromkeys(check.precision for check in found.checks))
    limits: dict[str, float] = {}
    for check in found.checks:
        if check.limit:
            limits[check.precision] = min(check.limit, limits.get(check.precision, check.limit))
    allowed = ", ".join(f"{name} {limit:.0e}" for name, limit in limits.items()).replace("e-0", "e-")
    if any(check.limit > limits[check.precision] for check in found.checks if check.limit):
        allowed += ", or twice plain PyTorch's"
    table = _table("operation", *precisions, "verdict")
    for name in dict.fromkeys(check.operation for check in found.checks):
        own = {check.precision: check for check in found.checks if check.operation == name}
        right = all(check.ok for check in own.values())
        cells = [_verdict(own[precision]) for precision in precisions]
        _add(table, name, *cells, ("right", "green") if right else ("WRONG", "bold red"))
    return f"Self-check against exact results (at most {allowed})", table


def _verdict(check: Check) -> tuple[str, str]:
    """Text and style of one check."""
    if check.error is None:
        return "fails", "bold red"
    text = "equal" if check.error == 0 else _error_text(check.error)
    return text, "green" if check.ok else "bold red"


def _timings(found: Diagnosis) -> tuple[str, Table]:
    """Milliseconds; with kernels, those of plain PyTorch beside them."""
    kernels = any(timing.kernel for timing in found.timings)
    table = _table("operation", "case", "forward", "with backward", *(["times as fast"] if kernels else []))
    for timing in found.timings:
        ours, theirs = timing.kernel, timing.reference
        forward, both = _ms(theirs.forward_ms if theirs else None), _ms(theirs.both_ms if theirs else None)
        if not kernels:
            _add(table, timing.operation, timing.shape, forward, both)
            continue
        faster = "-"
        if ours and theirs:
            faster = f"{(theirs.both_ms or theirs.forward_ms) / (ours.both_ms or ours.forward_ms):.1f}"
        forward = f"{_ms(ours.forward_ms if ours else None)} | {forward}"
        both = f"{_ms(ours.both_ms if ours else None)} | {both}"
        _add(table, timing.operation, timing.shape, forward, both, faster)
    for column in table.columns[2:]:
        column.justify = "right"
    precision = found.timings[0].precision if found.timings else ""
    return f"Milliseconds of one call{', Triton | PyTorch' if kernels else ''}, {precision}", table


def _table(*columns: str) -> Table:
    """Columns without names make a plain list."""
    from rich import box
    from rich.table import Table

    named = any(columns)
    table = Table(show_header=named, box=box.SIMPLE_HEAD if named else None, show_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    return table


def _add(table: Table, *cells: str | tuple[str, str]) -> None:
    from rich.text import Text

    texts: list[Text] = []
    for cell in cells:
        content, style = (cell, "") if isinstance(cell, str) else cell
        texts.append(Text(output.printable(content), style=style))
    table.add_row(*texts)


def _card(card: Card) -> str:
    memory = _memory(card.total_bytes, card.free_bytes)
    bf16 = "bf16" if card.bf16 else "no bf16"
    return f"{card.name}, {memory}, compute capability {card.capability[0]}.{card.capability[1]}, {bf16}"


def _extra(extra: str, missing: list[str]) -> str:
    return f'{", ".join(missing)} not installed: pip install "affmae[{extra}]"'


def _memory(total: int | None, free: int | None) -> str:
    from affmae_engine.errors import human_bytes

    if total is None:
        return ""
    return human_bytes(total) + (f" ({human_bytes(free)} free)" if free is not None else "")


def _disk(machine: Machine) -> str:
    from affmae_engine.errors import human_bytes

    if machine.disk_free_bytes is None:
        return machine.problems.get("disk", "unknown")
    return f"{human_bytes(machine.disk_free_bytes)} free for {machine.runs}"


def _preset(card: Card | None) -> str:
    from affmae_cli.preset_files import preset_for_card

    return preset_for_card(card.name, card.total_bytes / 2**30) if card else "demo"


def _error_text(error: float) -> str:
    return f"{error:.1e}".replace("e-0", "e-") if math.isfinite(error) else "not finite"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
