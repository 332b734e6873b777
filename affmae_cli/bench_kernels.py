"""`affmae bench --kernels`: single operations against their references, and (`--counters`) what bounds each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from affmae_cli import output
from affmae_cli.bench_compare import changes, with_changes
from affmae_cli.bench_plan import Plan
from affmae_cli.bench_tables import show_tables
from affmae_engine.bench import ceilings, report
from affmae_engine.bench.counters import KernelCount, count_kernels
from affmae_engine.bench.kernels import KernelResult, run_cases
from affmae_engine.errors import AffmaeError


def run_kernels(
    plan: Plan, old: dict[str, Any] | None, *, reference: bool, counters: bool, json: bool, quiet: bool
) -> None:
    """Time the operations, write what was measured after each, and show it.

    Args:
        plan: which operations, where.
        old: an earlier result to compare with.
        reference: time the references too.
        counters: count bytes and instructions of every kernel afterwards.
        json: print the document instead of tables.
        quiet: no progress.

    Raises:
        AffmaeError: an operation is wrong or does not run; the others are written and shown before.
        ResourceError: `counters`, and NVIDIA's profiler is absent or refused; the times are written before.
    """
    device, precision = plan.choice.device, plan.choice.dtype
    about = report.circumstances(plan.choice, plan.remarks)
    limits = ceilings.measure_ceilings(device, precision)
    results: list[KernelResult] = []
    tell = (lambda text: None) if quiet else output.say

    def described(counts: Sequence[KernelCount] = ()) -> tuple[dict[str, Any], list[report.Table]]:
        tables = [report.kernel_table(results)] if results else []
        more: dict[str, Any] = {"ceilings": vars(limits)}
        if counts:
            tables.append(report.counter_table(counts))
            more["counters"] = [count.as_dict() for count in counts]
        values = report.document("kernels", about, [result.as_dict() for result in results], **more)
        if plan.out is not None:
            report.write(plan.out, values, report.markdown("kernels", about, tables, limits))
        return values, tables

    for result in run_cases(
        plan.settings, device, precision, limits, operations=plan.operations, seconds=plan.seconds,
        reference=reference, tell=tell,
    ):  # fmt: skip
        results.append(result)
        described()
    counts: list[KernelCount] = []
    if counters:
        tell("counting bytes and instructions")
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        counts = count_kernels(plan.settings, plan.operations, precision, limits.gb_s, multiprocessors)
    values, tables = described(counts)
    if json:
        output.print_json(with_changes(values, old))
    else:
        output.show(f"copy {limits.gb_s:.0f} GB/s, matrix product {limits.tflop_s:.3g} TFLOP/s")
        show_tables([*tables, *changes(values, old)])
    refuse_wrong(results)


def refuse_wrong(results: Sequence[KernelResult]) -> None:
    """Ends the command when an operation is wrong or does not run at all.

    Raises:
        AffmaeError: naming the first one.
    """
    bad = [result for result in results if result.status in ("wrong", "failed")]
    if bad:
        first = bad[0]
        raise AffmaeError(
            f"{len(bad)} of {len(results)} cases are wrong or do not run, first {first.op} {first.shape} "
            f"({first.backend}): {first.note}",
            "their speed says nothing; --set kernels.backend=reference trains without the Triton kernels",
        )
