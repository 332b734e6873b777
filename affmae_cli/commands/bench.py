"""`affmae bench`: AFFMAE against ViT-MAE on this machine, or (`--kernels`) single operations against their references.

What is wrong is not timed: each operation is first compared with its float64 reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from affmae_cli import output
from affmae_cli.bench_compare import CompareOption
from affmae_cli.bench_tables import show_tables
from affmae_cli.options import ConfigOption, DeviceOption, JsonOption, PresetOption, QuietOption, SetOption
from affmae_cli.pixel_size import PixelSizeOption
from affmae_cli.quality_options import (
    BudgetOption,
    FinetuneBudgetOption,
    FractionsOption,
    ImagesOption,
    LabelsOption,
    QualityOption,
    SeedsOption,
    UnlabelledOption,
)

if TYPE_CHECKING:
    from affmae_cli.bench_plan import Plan
    from affmae_cli.bench_view import View
    from affmae_cli.quality_plan import QualityOptions
    from affmae_engine.bench.comparison import Comparison
    from affmae_engine.bench.results import Ratio, Result

    Old = dict[str, Any] | None
    """An earlier result to compare with."""

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
    counters: Annotated[
        bool,
        typer.Option(
            "--counters",
            help="Also count bytes and instructions with NVIDIA's ncu: what bounds each kernel.",
            rich_help_panel=_KERNELS,
        ),
    ] = False,
    quality: QualityOption = False,
    images: ImagesOption = None,
    labels: LabelsOption = None,
    unlabelled: UnlabelledOption = None,
    budget: BudgetOption = None,
    finetune_budget: FinetuneBudgetOption = None,
    seeds: SeedsOption = None,
    label_fractions: FractionsOption = None,
    pixel_size: PixelSizeOption = None,
    preset: PresetOption = "auto",
    config: ConfigOption = None,
    set_: SetOption = None,
    compare: CompareOption = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.md and results.json there.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare AFFMAE with ViT-MAE on this machine: speed, memory, arithmetic.

    Without options a quick look at the small network; `--full` measures both sizes at both resolutions. `--quality`
    asks what the two learn in equal time, on your own labelled images.
    """
    from affmae_cli import bench_plan, quality_plan
    from affmae_cli.bench_compare import read_old

    old = read_old(compare, "quality" if quality else "kernels" if kernels else "comparison")
    speed_options = {
        "--resolutions": resolutions, "--task": task != "pretrain", "--batch": batch != "auto", "--vit": vit != "auto",
        "--models": models != "affmae,vit-mae", "--dtype": dtype != "auto", "--data": data, "--quick": quick,
        "--full": full, "--rounds": rounds, "--steps": steps, "--compile": compile_ is not None, "--ops": ops,
        "--max-batch": max_batch, "--profile": profile, "--kernels": kernels,
        "--counters": counters,
    }  # fmt: skip
    asked = quality_plan.QualityOptions(
        images=images, labels=labels, unlabelled=unlabelled, budget=budget, finetune_budget=finetune_budget,
        seeds=seeds, fractions=label_fractions, sizes=sizes, preset=preset, config=config, set_=set_, device=device,
        pixel_size=pixel_size,
    )  # fmt: skip
    asked.refuse_mixture(quality, speed_options)
    if quality:
        _quality(asked, out, old, json=json, quiet=quiet)
        return
    plan = bench_plan.make_plan(
        bench_plan.Options(
            sizes=sizes, resolutions=resolutions, batch=batch, task=task, models=models, vit=vit, dtype=dtype,
            device=device, quick=quick, full=full, compile=compile_, rounds=rounds, steps=steps, max_batch=max_batch,
            data=data, profile=profile, timeout=timeout, kernels=kernels, counters=counters,
            operations=ops, out=out,
        )
    )  # fmt: skip
    if not quiet:
        output.say(plan.choice.description)
        for remark in plan.remarks:
            output.say(remark, label="note", style="bold yellow")
    if kernels:
        from affmae_cli.bench_kernels import run_kernels

        run_kernels(plan, old, reference=reference, counters=counters, json=json, quiet=quiet)
    else:
        _networks(plan, old, json=json, quiet=quiet)


def _quality(asked: QualityOptions, out: Path | None, old: Old, *, json: bool, quiet: bool) -> None:
    from affmae_cli.bench_compare import changes, with_changes
    from affmae_cli.bench_quality import run_quality
    from affmae_engine.bench import quality_report

    values = run_quality(asked, out, quiet=quiet)
    if json:
        output.print_json(with_changes(values, old))
        return
    for sentence in quality_report.in_short(values):
        output.show(sentence)
    show_tables([*quality_report.tables(values), *changes(values, old)])


def _networks(plan: Plan, old: Old, *, json: bool, quiet: bool) -> None:
    """The comparison; what was measured is written after every process, so that nothing is lost on the way.

    Operations are checked while compilers run, which disturbs neither; nothing is timed before both are done.
    """
    from concurrent.futures import ThreadPoolExecutor

    from affmae_cli.bench_charts import charted
    from affmae_cli.bench_compare import changes, with_changes
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
    if plan.out is not None:
        section = charted(values, plan.out, quiet=quiet)
        report.write(plan.out, values, comparison_report.markdown(values, results, ratios, section))
    if json:
        output.print_json(with_changes(values, old))
        return
    for sentence in comparison_report.sentences(ratios, results):
        output.show(sentence.replace("**", ""))
    show_tables([*comparison_report.tables(results, ratios), *changes(values, old)])


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
    from affmae_cli.bench_kernels import refuse_wrong
    from affmae_engine.bench.kernels import run_cases

    found = list(
        run_cases(
            plan.gate_settings, plan.choice.device, plan.choice.dtype, None, operations=plan.operations,
            tell=lambda text: view.tell(f"check {text}"),
        )
    )  # fmt: skip
    refuse_wrong(found)
    return {"cases": len(found), "worst_error": max((result.worst_error for result in found), default=0.0)}
