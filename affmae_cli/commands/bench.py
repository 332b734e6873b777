"""`affmae bench`: AFFMAE against ViT-MAE on this machine, or (`--kernels`) single operations against their references.

What is wrong is not timed: each operation is first compared with its float64 reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from affmae_cli import output
from affmae_cli.options import DeviceOption, JsonOption, QuietOption

if TYPE_CHECKING:
    from affmae_cli.bench_plan import Plan
    from affmae_cli.bench_view import View
    from affmae_engine.bench.comparison import Comparison
    from affmae_engine.bench.kernels import KernelResult
    from affmae_engine.bench.report import Table
    from affmae_engine.bench.results import Ratio, Result

_NETWORKS, _HOW, _KERNELS = "What is compared", "How it is measured", "Single operations"


def bench(
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes",
            metavar="LIST",
            help="tiny, small, base; small unless full.",
            rich_help_panel=_NETWORKS,
        ),
    ] = None,
    resolutions: Annotated[
        str | None,
        typer.Option(
            "--resolutions",
            metavar="LIST",
            help="Edges in pixels; 512 unless full.",
            rich_help_panel=_NETWORKS,
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option("--task", metavar="LIST", help="pretrain, finetune, predict.", rich_help_panel=_NETWORKS),
    ] = "pretrain",
    batch: Annotated[
        str,
        typer.Option(
            "--batch", metavar="N|auto", help="Images; `auto` by task, size and card.", rich_help_panel=_NETWORKS
        ),
    ] = "auto",
    models: Annotated[
        str, typer.Option("--models", metavar="LIST", help="affmae, vit-mae.", rich_help_panel=_NETWORKS)
    ] = "affmae,vit-mae",
    vit: Annotated[
        str,
        typer.Option(
            "--vit",
            metavar="LIST",
            help="How ViT-MAE runs: auto (the faster of compile and graph), compile, compile-fp32-residual, graph "
            "(recorded step), reduce-overhead, eager. The fastest counts.",
            rich_help_panel=_NETWORKS,
        ),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option("--dtype", help="Of features and autocast.", rich_help_panel=_NETWORKS),
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="STORE",
            help="Dataset made by `affmae ingest`: also time pretraining with its loading.",
            rich_help_panel=_NETWORKS,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Few rounds, AFFMAE not compiled; unless sizes are named.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="small and base at 512 and 1024 px, compiled, three rounds.", rich_help_panel=_HOW),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Processes per case.", rich_help_panel=_HOW)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Timed steps in each.", rich_help_panel=_HOW)
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile AFFMAE's layers, as long training runs do. Default: not when quick.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    max_batch: Annotated[
        bool,
        typer.Option("--max-batch", help="Also find the largest batch that fits.", rich_help_panel=_HOW),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where each step spends its time.", rich_help_panel=_HOW)
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until a process is given up.", rich_help_panel=_HOW)
    ] = 900.0,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Time single operations instead of networks.", rich_help_panel=_KERNELS),
    ] = False,
    ops: Annotated[
        str | None,
        typer.Option("--ops", metavar="LIST", help="Only these operations.", rich_help_panel=_KERNELS),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Time the references too.", rich_help_panel=_KERNELS),
    ] = True,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.md and results.json there.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare AFFMAE with ViT-MAE on this machine: speed, memory, arithmetic.

    Without options a quick look at the small network; `--full` measures both sizes at both resolutions.
    """
    from affmae_cli import bench_plan

    plan = bench_plan.make_plan(
        bench_plan.Options(
            sizes=sizes, resolutions=resolutions, batch=batch, task=task, models=models, vit=vit, dtype=dtype,
            device=device, quick=quick, full=full, compile=compile_, rounds=rounds, steps=steps, max_batch=max_batch,
            data=data, profile=profile, timeout=timeout, kernels=kernels, operations=ops, out=out,
        )
    )  # fmt: skip
    if not quiet:
        output.say(plan.choice.description)
        for remark in plan.remarks:
            output.say(remark, label="note", style="bold yellow")
    if kernels:
        _kernels(plan, reference=reference, json=json, quiet=quiet)
    else:
        _networks(plan, json=json, quiet=quiet)


def _kernels(plan: Plan, *, reference: bool, json: bool, quiet: bool) -> None:
    from affmae_engine.bench import ceilings, report
    from affmae_engine.bench.kernels import run_cases

    device, precision = plan.choice.device, plan.choice.dtype
    about = report.circumstances(plan.choice, plan.remarks)
    limits = ceilings.measure_ceilings(device, precision)
    results: list[KernelResult] = []
    tables: list[Table] = []
    values = report.document("kernels", about, [], ceilings=vars(limits))
    for result in run_cases(
        plan.settings, device, precision, limits, operations=plan.operations, seconds=plan.seconds,
        reference=reference, tell=(lambda text: None) if quiet else output.say,
    ):  # fmt: skip
        results.append(result)
        tables = [report.kernel_table(results)]
        values = report.document("kernels", about, [r.as_dict() for r in results], ceilings=vars(limits))
        if plan.out is not None:
            report.write(plan.out, values, report.markdown("kernels", about, tables, limits))
    if json:
        output.print_json(values)
    else:
        output.show(f"copy {limits.gb_s:.0f} GB/s, matrix product {limits.tflop_s:.3g} TFLOP/s")
        _show(tables)
    _refuse_wrong(results)


def _networks(plan: Plan, *, json: bool, quiet: bool) -> None:
    """The comparison; what was measured is written after every process, so that nothing is lost on the way.

    Operations are checked while compilers run, which disturbs neither; nothing is timed before both are done.
    """
    from concurrent.futures import ThreadPoolExecutor

    from affmae_cli.bench_view import showing
    from affmae_engine.bench import comparison_report, report
    from affmae_engine.bench.card import CardWatch
    from affmae_engine.bench.comparison import Comparison
    from affmae_engine.bench.processes import Processes

    about = report.circumstances(plan.choice, plan.remarks)
    with (
        showing(quiet=quiet) as view,
        ThreadPoolExecutor(1) as aside,
        Processes(plan.timeout, ahead=plan.ahead) as processes,
    ):
        comparison = Comparison(plan.cases, plan.comparison, view.changed)
        view.follow(comparison.outcomes, comparison.clock)
        compiling = aside.submit(comparison.compile_all, processes)
        gate = _gate(plan, view)
        compiling.result()
        with CardWatch(plan.choice.device) as card:
            for _ in comparison.measure(processes):
                values, results, ratios = _document(about, gate, plan, comparison, card.record())
                if plan.out is not None:
                    report.write(plan.out, values, comparison_report.markdown(values, results, ratios))
    if json:
        output.print_json(values)
        return
    for sentence in comparison_report.sentences(ratios, results):
        output.show(sentence.replace("**", ""))
    _show(comparison_report.tables(results, ratios))


def _document(
    about: dict[str, Any], gate: dict[str, Any], plan: Plan, comparison: Comparison, card: dict[str, Any]
) -> tuple[dict[str, Any], list[Result], list[Ratio]]:
    """The document of what is known so far, and its results and ratios as records."""
    from affmae_engine.bench import report
    from affmae_engine.bench.results import ratios_of, result_of

    results = [result_of(outcome) for outcome in comparison.outcomes]
    ratios = ratios_of(results)
    asked = plan.comparison
    settings = {"rounds": asked.rounds, "steps": asked.request.steps, "warmup": asked.request.warmup}
    values = report.document(
        "comparison", about, [result.model_dump(mode="json") for result in results],
        settings=settings, gate=gate, card=card, ratios=[ratio.model_dump(mode="json") for ratio in ratios],
    )  # fmt: skip
    return values, results, ratios


def _gate(plan: Plan, view: View) -> dict[str, Any]:
    """Compares every operation with its reference.

    Raises:
        AffmaeError: one is wrong or does not run.
    """
    from affmae_engine.bench.kernels import run_cases

    found = list(
        run_cases(
            plan.gate_settings, plan.choice.device, plan.choice.dtype, None, operations=plan.operations,
            tell=lambda text: view.tell(f"check {text}"),
        )
    )  # fmt: skip
    _refuse_wrong(found)
    return {"cases": len(found), "worst_error": max((result.worst_error for result in found), default=0.0)}


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


def _show(tables: list[Table]) -> None:
    """Tables without their empty columns; where there is no terminal they are as wide as they need to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables:
        used = table.without_empty_columns()
        if not used.columns:
            continue
        shown = RichTable(title=Text(used.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in used.columns:
            shown.add_column(Text(name), overflow="fold")
        for row in used.rows:
            shown.add_row(*(Text(output.printable(cell)) for cell in row))
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal:
            natural = Console(width=1000).measure(shown).maximum
            console = Console(highlight=False, emoji=False, width=max(natural, len(used.title)))
        with console.capture() as rendered:
            console.print(shown)
        output.show(rendered.get())
