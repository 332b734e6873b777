"""What every benchmark says: circumstances and document for JSON, tables of text for the terminal and for report.md.

A figure without its circumstances is worth nothing, so the document holds the card, the versions, the commit, the
dtype, rho and the mask ratio. What a comparison of the families says in addition is in `comparison_report`.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from affmae_engine import atomic
from affmae_engine.bench.ceilings import Ceilings
from affmae_engine.bench.counters import KernelCount
from affmae_engine.bench.kernels import KernelResult
from affmae_engine.config import MaskConfig, ModelConfig
from affmae_engine.doctor.machine import installed
from affmae_engine.events import finite
from affmae_engine.train.device import DeviceChoice
from affmae_engine.train.environment import command_line, git_state, kernel_backends

SCHEMA = 2
GATE_NOTE = "Every result and gradient was compared with the float64 reference before it was timed."


@dataclass(frozen=True)
class Table:
    """Text by rows and columns."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def without_empty_columns(self) -> Table:
        """The table with the columns in which any row says something."""
        used = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        return Table(self.title, tuple(self.columns[i] for i in used), [tuple(r[i] for i in used) for r in self.rows])

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [f"## {self.title}", "", _line(self.columns), _line("---" for _ in self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


def circumstances(choice: DeviceChoice, remarks: Sequence[str]) -> dict[str, Any]:
    """Where and with what something was measured."""
    found = {name: installed(name) for name in ("affmae", "torch", "triton")}
    model, mask = ModelConfig(), MaskConfig()
    return {
        "device": choice.description,
        "dtype": choice.precision,
        "versions": {name: number for name, number in found.items() if number},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "backends": kernel_backends("auto", choice.device),
        "git": git_state(),
        "command": command_line(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "merge_keep": model.merge_keep,
        "mask_ratio": mask.ratio,
        "mask_kind": mask.kind,
        "remarks": list(remarks),
    }


def kernel_table(results: Iterable[KernelResult]) -> Table:
    """Single operations. GB/s, TFLOP/s and the bound belong to forward and backward, where there is a backward pass."""
    columns = ("operation", "px", "shape", "runs", "error", "fwd ms", "fwd+bwd ms", "reference ms", "times faster")
    rows = []
    for result in results:
        whole, reference = result.both or result.forward, result.reference_both_ms or result.reference_forward_ms
        cells = [result.op, str(result.resolution), result.shape, result.backend, f"{result.worst_error:.1e}"]
        if whole is None or result.forward is None:
            rows.append((*cells, result.status, *[""] * 6, result.note))
            continue
        rows.append(
            (
                *cells,
                figure(result.forward["ms"]),
                figure(result.both["ms"]) if result.both else "",
                figure(reference),
                figure(reference / whole["ms"] if reference else None),
                figure(whole["gb_s"]),
                figure(whole["tflop_s"]),
                figure(whole["bound_ms"]),
                "",
            )
        )
    return Table("Single operations", (*columns, "GB/s", "TFLOP/s", "bound ms", "note"), rows)


def counter_table(counts: Iterable[KernelCount]) -> Table:
    """What bounds each kernel. Kernels that run several times in a case have a row each time."""
    rows = [
        (
            count.op,
            count.shape,
            count.kernel.strip("_"),
            figure(count.us),
            figure(count.bytes_us),
            figure(count.issue_us),
            f"{count.over_bound:.2f}",
            str(count.registers),
        )
        for count in counts
    ]
    columns = ("operation", "shape", "kernel", "us", "bytes us", "issue us", "times bound", "registers")
    return Table("What bounds each kernel", columns, rows)


def profile_table(title: str, profile: dict[str, Any]) -> Table:
    """Where a step spends its time; `profile` is `Profile.as_dict()`."""
    total = profile["total_ms"] or 1.0
    rows = [
        (name, figure(ms), f"{100 * ms / total:.1f} %", f"{launches:.0f}")
        for name, (ms, launches) in profile["categories"].items()
    ]
    return Table(
        f"{title}: time by kind of kernel",
        ("kind", "ms a step", "share", "launches"),
        [*rows, ("sum", figure(total), "", "")],
    )


def document(kind: str, about: dict[str, Any], results: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The whole outcome as JSON values; numbers that are not finite become None."""
    values: dict[str, Any] = {"schema": SCHEMA, "kind": kind, **about, **more, "results": list(results)}
    plain: dict[str, Any] = finite(values)
    return plain


def markdown(kind: str, about: dict[str, Any], tables: Sequence[Table], ceilings: Ceilings | None = None) -> str:
    """report.md."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# affmae bench: {kind}",
        "",
        f"{about['device']}; {versions}. Features and autocast {about['dtype']}; rho {about['merge_keep']}, mask ratio "
        f"{about['mask_ratio']} ({about['mask_kind']}). Medians. {GATE_NOTE}",
    ]
    if ceilings is not None:
        lines.append(
            f"Measured ceilings: copy {ceilings.gb_s:.0f} GB/s, matrix product {ceilings.tflop_s:.3g} TFLOP/s; `bound "
            "ms` is the larger of bytes and operations by them, where every input is read once and every output "
            "written once."
        )
    lines += [f"\n**{remark}**" for remark in about["remarks"]]
    return "\n".join([*lines, "", *[table.markdown() for table in tables]])


def write(folder: Path, values: dict[str, Any], text: str) -> None:
    """Write results.json and report.md into a folder that exists."""
    atomic.commit_json(folder / "results.json", values)
    atomic.commit_text(folder / "report.md", text)


def figure(value: float | None) -> str:
    """Three digits that mean something, without exponents."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
