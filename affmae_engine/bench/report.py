"""What a benchmark says: one document for JSON, and tables of text for the terminal and for report.md.

A figure without its circumstances is worth nothing, so the document holds the card, the versions, the dtype, rho and
the mask ratio. Ratios are taken between what ran in one process.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from affmae_engine import atomic
from affmae_engine.bench.ceilings import Ceilings
from affmae_engine.bench.kernels import KernelResult
from affmae_engine.bench.step import StepResult
from affmae_engine.config import MaskConfig, ModelConfig
from affmae_engine.events import finite
from affmae_engine.train.device import DeviceChoice

SCHEMA = 1
GATE_NOTE = "Every result and gradient was compared with the float64 reference before it was timed."


@dataclass(frozen=True)
class Table:
    """Text by rows and columns."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [f"## {self.title}", "", _line(self.columns), _line("---" for _ in self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


def circumstances(choice: DeviceChoice, remarks: Sequence[str]) -> dict[str, Any]:
    """Where and with what something was measured."""
    found = {}
    for name in ("affmae", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    model, mask = ModelConfig(), MaskConfig()
    return {
        "device": choice.description,
        "dtype": choice.precision,
        "versions": found,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
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
                _number(result.forward["ms"]),
                _number(result.both["ms"]) if result.both else "",
                _number(reference),
                _number(reference / whole["ms"] if reference else None),
                _number(whole["gb_s"]),
                _number(whole["tflop_s"]),
                _number(whole["bound_ms"]),
                "",
            )
        )
    return Table("Single operations", (*columns, "GB/s", "TFLOP/s", "bound ms", "note"), rows)


def step_table(results: Iterable[StepResult]) -> Table:
    """Whole training steps."""
    columns = ("px", "size", "batch", "model", "runs as", "step ms", "img/s", "peak GiB", "reserved GiB", "note")
    rows = []
    for result in results:
        rows.append(
            (
                str(result.resolution),
                result.size,
                str(result.batch),
                result.model,
                result.how,
                _number(result.ms) if result.status == "ok" else result.status,
                _number(result.images_per_s),
                _number(result.allocated_gib),
                _number(result.reserved_gib),
                result.note,
            )
        )
    return Table("Training steps", columns, rows)


def step_ratios(results: Sequence[StepResult]) -> list[dict[str, Any]]:
    """AFFMAE against the fastest ViT-MAE of the same size, resolution and batch.

    Returns:
        records with "speed" (ViT-MAE's time by AFFMAE's) and "memory" (AFFMAE's peak by ViT-MAE's); None where one
        side has no figure.
    """
    records = []
    for ours in results:
        if ours.model != "affmae":
            continue
        same = (ours.size, ours.resolution, ours.batch)
        theirs = [r for r in results if r.model != "affmae" and (r.size, r.resolution, r.batch) == same]
        if not theirs:
            continue
        best = min(theirs, key=lambda result: result.ms or math.inf)
        memory = None
        if ours.ms and best.ms and ours.allocated_gib and best.allocated_gib:
            memory = ours.allocated_gib / best.allocated_gib
        records.append(
            {
                "size": ours.size,
                "resolution": ours.resolution,
                "batch": ours.batch,
                "against": best.how,
                "speed": best.ms / ours.ms if ours.ms and best.ms else None,
                "memory": memory,
            }
        )
    return records


def ratio_table(ratios: Iterable[dict[str, Any]]) -> Table:
    """`step_ratios` as text."""
    rows = [
        (
            str(ratio["resolution"]),
            ratio["size"],
            str(ratio["batch"]),
            ratio["against"],
            _number(ratio["speed"]),
            _number(ratio["memory"]),
        )
        for ratio in ratios
    ]
    columns = ("px", "size", "batch", "against ViT-MAE as", "time, ViT-MAE / AFFMAE", "memory, AFFMAE / ViT-MAE")
    return Table("AFFMAE against ViT-MAE", columns, rows)


def profile_table(result: StepResult) -> Table:
    """Where one model's step spends its time."""
    profile = result.profile or {"categories": {}, "total_ms": 0.0}
    total = profile["total_ms"] or 1.0
    rows = [
        (name, _number(ms), f"{100 * ms / total:.1f} %", f"{launches:.0f}")
        for name, (ms, launches) in profile["categories"].items()
    ]
    title = f"{result.model} {result.size}, {result.resolution} px, batch {result.batch}: time by kind of kernel"
    return Table(title, ("kind", "ms a step", "share", "launches"), [*rows, ("sum", _number(total), "", "")])


def document(kind: str, about: dict[str, Any], results: Sequence[Any], **more: Any) -> dict[str, Any]:
    """The whole outcome as JSON values; numbers that are not finite become None."""
    values: dict[str, Any] = {"schema": SCHEMA, "kind": kind, **about, **more}
    values["results"] = [result.as_dict() for result in results]
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


def _number(value: float | None) -> str:
    """Three digits that mean something, without exponents."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
