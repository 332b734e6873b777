"""`affmae bench`: whole training steps against ViT-MAE, or (`--kernels`) single operations against their references.

What is wrong is not timed: each operation is first compared with its float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import ConfigOption, DeviceOption, JsonOption, PresetOption, QuietOption, SetOption
from affmae_cli.pixel_size import PixelSizeOption

if TYPE_CHECKING:
    from affmae_cli.bench_plan import Plan
    from affmae_cli.quality_plan import QualityOptions
    from affmae_engine.bench.kernels import KernelResult
    from affmae_engine.bench.report import Table

_STEPS, _KERNELS, _QUALITY = "Training steps", "Single operations", "Quality (--quality)"


def bench(
    kernels: Annotated[bool, typer.Option("--kernels", help="Time single operations instead of steps.")] = False,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="LIST", help="tiny, small, base; default small,base.")
    ] = None,
    resolutions: Annotated[
        str | None, typer.Option("--resolutions", metavar="LIST", help="Edges in pixels; default 512,1024.")
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N|auto", help="Images; `auto` 32 (small: 64) at 512, 8 at 1024.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option("--dtype", help="Of features and autocast.")
    ] = "auto",
    device: DeviceOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few repeats, and a tiny model unless sizes are given.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.md and results.json there.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Timed steps; default 30.", rich_help_panel=_STEPS)
    ] = None,
    models: Annotated[
        str, typer.Option("--models", metavar="LIST", help="affmae, vit-mae.", rich_help_panel=_STEPS)
    ] = "affmae,vit-mae",
    vit: Annotated[
        str,
        typer.Option(
            "--vit",
            metavar="LIST",
            help="How ViT-MAE runs: compile, compile-fp32-residual, graph (recorded step), reduce-overhead, eager. "
            "The fastest counts.",
            rich_help_panel=_STEPS,
        ),
    ] = "compile",
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where each step spends its time.", rich_help_panel=_STEPS)
    ] = False,
    ops: Annotated[
        str | None,
        typer.Option("--ops", metavar="LIST", help="Only these operations.", rich_help_panel=_KERNELS),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Time the references too.", rich_help_panel=_KERNELS),
    ] = True,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Pretrain both models for equal time on your images, finetune both, compare their scores.",
            rich_help_panel=_QUALITY,
        ),
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", metavar="PATH", help="Labelled images.", rich_help_panel=_QUALITY),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="PATH", help="Their labels, as for finetune.", rich_help_panel=_QUALITY),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            "--unlabelled", metavar="PATH", help="More images, to pretrain on only.", rich_help_panel=_QUALITY
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="TIME", help="One pretraining, such as 90s, 10m, 2h.", rich_help_panel=_QUALITY
        ),
    ] = "10m",
    finetune_budget: Annotated[
        str | None,
        typer.Option(
            "--finetune-budget",
            metavar="TIME",
            help="One finetuning of the slower model, whose steps both take; default a quarter of --budget.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repeats of everything.", rich_help_panel=_QUALITY)] = 3,
    label_fractions: Annotated[
        str,
        typer.Option(
            "--label-fractions", metavar="LIST", help="Shares of the labels besides 1.", rich_help_panel=_QUALITY
        ),
    ] = "0.1,0.25",
    pixel_size: PixelSizeOption = None,
    preset: PresetOption = "auto",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Measure AFFMAE on this machine: training steps against ViT-MAE, or single operations."""
    from affmae_cli import bench_plan

    if quality:
        from affmae_cli.quality_plan import QualityOptions

        options = QualityOptions(
            images or (), labels or (), unlabelled or (), budget, finetune_budget, seeds, label_fractions, sizes,
            preset, config, set_ or (), device, pixel_size,
        )  # fmt: skip
        _quality(options, out, json=json, quiet=quiet)
        return
    plan = bench_plan.make_plan(
        sizes=sizes, resolutions=resolutions, batch=batch, dtype=dtype, device=device, quick=quick, steps=steps,
        models=models, vit=vit, operations=ops, out=out,
    )  # fmt: skip
    if not quiet:
        output.say(plan.choice.description)
        for remark in plan.remarks:
            output.say(remark, label="note", style="bold yellow")
    if kernels:
        _kernels(plan, reference=reference, json=json, quiet=quiet)
    else:
        _steps(plan, profile=profile, json=json, quiet=quiet)


def _quality(options: QualityOptions, out: Path | None, *, json: bool, quiet: bool) -> None:
    from affmae_cli.bench_quality import run_quality
    from affmae_engine.bench import quality_report

    values = run_quality(options, out, quiet=quiet)
    if json:
        output.print_json(values)
        return
    _show(quality_report.tables(values))
    output.show("\n".join(f"- {sentence}" for sentence in quality_report.in_short(values)))


def _kernels(plan: Plan, *, reference: bool, json: bool, quiet: bool) -> None:
    from affmae_engine.bench import ceilings, report
    from affmae_engine.bench.kernels import run_cases

    device, precision = plan.choice.device, plan.choice.dtype
    about = report.circumstances(plan.choice, plan.remarks)
    limits = ceilings.measure_ceilings(device, precision)
    results: list[KernelResult] = []
    tables: list[Table] = []
    values = report.document("kernels", about, results, ceilings=vars(limits))
    for result in run_cases(
        plan.settings, device, precision, limits, operations=plan.operations, seconds=plan.seconds,
        reference=reference, tell=_teller(quiet),
    ):  # fmt: skip
        results.append(result)
        tables = [report.kernel_table(results)]
        values = report.document("kernels", about, results, ceilings=vars(limits))
        if plan.out is not None:
            report.write(plan.out, values, report.markdown("kernels", about, tables, limits))
    if json:
        output.print_json(values)
    else:
        output.show(f"copy {limits.gb_s:.0f} GB/s, matrix product {limits.tflop_s:.3g} TFLOP/s")
        _show(tables)
    _refuse_wrong(results)


def _steps(plan: Plan, *, profile: bool, json: bool, quiet: bool) -> None:
    from affmae_engine.bench import report
    from affmae_engine.bench.kernels import run_cases
    from affmae_engine.bench.step import StepResult, measure_step

    tell = _teller(quiet)
    about = report.circumstances(plan.choice, plan.remarks)
    gate = list(
        run_cases(
            plan.gate_settings, plan.choice.device, plan.choice.dtype, None, operations=plan.operations,
            tell=lambda text: tell(f"check {text}"),
        )
    )  # fmt: skip
    _refuse_wrong(gate)
    checked = {"cases": len(gate), "worst_error": max((result.worst_error for result in gate), default=None)}
    results: list[StepResult] = []
    tables: list[Table] = []
    values = report.document("steps", about, results, gate=checked, ratios=[])
    for case in plan.cases:
        tell(f"{case.model} {case.size}, {case.resolution} px, batch {case.batch}")
        results.append(measure_step(case, plan.choice, steps=plan.steps, warmup=plan.warmup, profile=profile))
        ratios = report.step_ratios(results)
        tables = [report.step_table(results), report.ratio_table(ratios)]
        tables += [report.profile_table(result) for result in results if result.profile]
        values = report.document("steps", about, results, gate=checked, ratios=ratios)
        if plan.out is not None:
            report.write(plan.out, values, report.markdown("training steps", about, tables))
    if json:
        output.print_json(values)
    else:
        _show(tables)


def _refuse_wrong(results: list[KernelResult]) -> None:
    """Ends the command when an operation is wrong or does not run at all."""
    from affmae_engine.errors import AffmaeError

    bad = [result for result in results if result.status in ("wrong", "failed")]
    if bad:
        first = bad[0]
        raise AffmaeError(
            f"{len(bad)} of {len(results)} cases are wrong or do not run, first {first.op} {first.shape} "
            f"({first.backend}): {first.note}",
            "their speed says nothing; --set kernels.backend=reference trains without the Triton kernels",
        )


def _teller(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else output.say


def _show(tables: list[Table]) -> None:
    """Tables without their empty columns; where there is no terminal they are as wide as they need to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables:
        used = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
        if not used:
            continue
        shown = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
        for i in used:
            shown.add_column(Text(table.columns[i]), overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(output.printable(row[i])) for i in used))
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal:
            natural = Console(width=1000).measure(shown).maximum
            console = Console(highlight=False, emoji=False, width=max(natural, len(table.title)))
        with console.capture() as rendered:
            console.print(shown)
        output.show(rendered.get())
