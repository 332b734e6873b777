"""`affmae bench`: AFFMAE against ViT-MAE in speed and in quality, and single operations against their references."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from affmae_cli import output
from affmae_cli.options import ConfigOption, DeviceOption, JsonOption, PresetOption, SetOption
from affmae_engine.errors import AffmaeError, ConfigError, Interrupted

app = typer.Typer(rich_markup_mode="rich", invoke_without_command=True)

SMALLEST_EDGE, LARGEST_EDGE = 64, 4096
_TINY = {"sizes": "tiny", "resolutions": "128", "batch": 2}
"""What is measured where there is no GPU."""
_CPU_REMARK = "No GPU: plain PyTorch on a CPU shows that everything runs, and says little about a GPU."
_Name = TypeVar("_Name", bound=str)

OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.md and results.json there.")
]
CompareOption = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD", help="Earlier results.json, or its folder: show what changed since."),
]


@app.callback()
def bench(ctx: typer.Context) -> None:
    """Compare AFFMAE with ViT-MAE on this machine.

    Without a subcommand: `bench speed` with its defaults, a pretraining step of the small network at 512 px.
    """
    if ctx.invoked_subcommand is None:
        speed()


@app.command()
def speed(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK]...", help="pretrain (default), finetune, predict.")
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", metavar="LIST", help="tiny, small (default), base.")] = None,
    resolutions: Annotated[
        str | None, typer.Option("--resolutions", metavar="LIST", help="Image edges in pixels. Default: 512.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images. Default: by task, size and resolution.")
    ] = None,
    families: Annotated[str, typer.Option("--families", metavar="LIST", help="affmae, vit-mae.")] = "affmae,vit-mae",
    protocol: Annotated[
        Literal["trainer", "paper", "both"],
        typer.Option("--protocol", help="`paper`: batch 4, no optimizer, as in the published benchmark."),
    ] = "trainer",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="STORE", help="Dataset: also time training with the data loader."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the most expensive kernels.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Start every case with empty compiler caches.")] = False,
    limit: Annotated[
        float | None,
        typer.Option("--limit", metavar="MINUTES", min=0, help="Start no case after this time; see -o."),
    ] = None,
    device: DeviceOption = None,
    compare: CompareOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Write the report there. Finished cases are kept; rerun to continue."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time and memory of a step, each case in a fresh process, both networks at their best.

    Full report in pieces: affmae bench speed pretrain finetune predict --sizes base,small --resolutions 512,1024
    --limit 6 -o bench, repeated until nothing is left.
    """
    import torch

    from affmae_cli.bench_output import finish
    from affmae_engine import atomic
    from affmae_engine.bench import report
    from affmae_engine.bench import speed as engine
    from affmae_engine.bench.child import Children
    from affmae_engine.bench.networks import Family, SpeedTask
    from affmae_engine.config import TrainConfig
    from affmae_engine.data.store import Store
    from affmae_engine.model.sizes import SIZES
    from affmae_engine.runtime.device import pick_device

    # Check the options before anything is measured.
    old = None if compare is None else report.read_results(compare, "speed")
    chosen_tasks = _names("TASK", tasks or ["pretrain"], get_args(SpeedTask))
    chosen_families = _names("--families", families.split(","), get_args(Family))
    choice = pick_device(TrainConfig.model_validate({"device": device or "auto"}))
    on_gpu = choice.device.type == "cuda"
    usual = {"sizes": "small", "resolutions": "512", "batch": None} if on_gpu else _TINY
    chosen_sizes = _names("--sizes", str(sizes or usual["sizes"]).split(","), list(SIZES))
    edges = _edges(str(resolutions or usual["resolutions"]))
    if data is not None:
        Store.open(data)
    cases = engine.cases_of(
        chosen_tasks,
        chosen_sizes,
        edges,
        chosen_families,
        ("trainer", "paper") if protocol == "both" else (protocol,),
        batch=batch or (None if on_gpu else 2),
        memory_gib=torch.cuda.get_device_properties(choice.device).total_memory / 2**30 if on_gpu else 0.0,
    )
    folder = None if out is None else atomic.ensure_folder(out)

    # Measure what an earlier call has not measured; write a report after every case.
    remarks = [] if on_gpu else [_CPU_REMARK]
    about = report.circumstances(choice, {"protocol": protocol, "cold caches": cold}, remarks)
    run = engine.SpeedRun(engine.SpeedPlan(cases, choice, profile, data, cold), about, folder)
    _begin(choice.description, remarks)
    if len(run.waiting) < len(cases):
        output.say(f"{len(cases) - len(run.waiting)} of {len(cases)} cases were finished earlier")

    def document() -> dict[str, Any]:
        return report.document(
            "speed",
            about,
            engine.records_of(run.results),
            engine.figures_of(run.results),
            ratios=engine.ratios_of(run.results),
            complete=not run.waiting,
        )

    title = "AFFMAE against ViT-MAE: speed and memory"
    try:
        with Children(engine.TIMEOUT_S) as children:
            limit_s = None if limit is None else 60 * limit
            for case in run.run(children, limit_s=limit_s, begin=lambda case: output.say(f"measuring {case.name}")):
                output.say(f"  {run.results[case].describe()}; {len(run.waiting)} left")
                if folder is not None:
                    report.write(folder, title, document(), engine.tables_of(run.results))
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"with {len(run.waiting)} of {len(cases)} cases left", "the same command continues"
        ) from error
    if run.waiting:
        output.say(f"{len(run.waiting)} of {len(cases)} cases left: repeat the command", label="note")
    finish(title, document(), engine.tables_of(run.results), folder=folder, old=old, json=json)


@app.command()
def kernels(
    operations: Annotated[
        list[str] | None, typer.Argument(metavar="[OPERATION]...", help="Only these operations. Default: all.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Also time the references in plain PyTorch.")
    ] = True,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option("--precision", help="Of the features.")
    ] = "auto",
    device: DeviceOption = None,
    compare: CompareOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Check every operation against its float64 reference, then time it at the shapes of the base network.

    Times stand beside the bound that the measured copy rate and matrix product rate of this device allow. Exits with 1
    if an operation is wrong or does not run.
    """
    from affmae_cli.bench_output import finish
    from affmae_engine import atomic
    from affmae_engine.bench import kernels as engine
    from affmae_engine.bench import report
    from affmae_engine.bench.child import Children
    from affmae_engine.config import TrainConfig
    from affmae_engine.runtime.device import pick_device
    from affmae_kernels.cases import OPERATIONS

    old = None if compare is None else report.read_results(compare, "kernels")
    chosen = _names("OPERATION", operations or OPERATIONS, OPERATIONS)
    choice = pick_device(TrainConfig.model_validate({"device": device or "auto", "precision": precision}))
    folder = None if out is None else atomic.ensure_folder(out)
    remarks = [] if choice.device.type == "cuda" else [_CPU_REMARK]
    about = report.circumstances(choice, {"reference": reference}, remarks)
    _begin(choice.description, remarks)
    found = []
    with Children(engine.TIMEOUT_S) as children:
        for item, result in engine.run_items(engine.items_of(chosen, choice, reference=reference), children):
            name = ", ".join(item[key] for key in ("what", "operation", "name") if key in item)
            output.say(f"{name}: {result['status']}")
            found.append((item, result))
    records, ceilings = engine.records_of(found)
    if ceilings is not None:
        about["settings"]["measured ceilings"] = f"{ceilings.gb_s:.0f} GB/s, {ceilings.tflop_s:.3g} TFLOP/s"
    values = report.document("kernels", about, records, engine.figures_of(records))
    finish("Operations", values, engine.tables_of(records), folder=folder, old=old, json=json)
    bad = [record for record in records if record["status"] != "ok"]
    if bad:
        raise AffmaeError(
            f"{len(bad)} of {len(records)} cases are wrong or do not run, first {bad[0]['operation']}, "
            f"{bad[0]['name']}: {bad[0]['note']}",
            "--set kernels.backend=reference trains without the Triton kernels",
        )


@app.command()
def quality(
    images: Annotated[list[str], typer.Option("--images", metavar="PATH", help="Labeled images. May be repeated.")],
    labels: Annotated[list[str], typer.Option("--labels", metavar="PATH", help="Their labels, as for finetune.")],
    unlabelled: Annotated[
        list[str] | None, typer.Option("--unlabelled", metavar="PATH", help="More images, for pretraining only.")
    ] = None,
    budget: Annotated[str, typer.Option("--budget", metavar="TIME", help="Of one pretraining.")] = "10m",
    finetune_budget: Annotated[
        str | None,
        typer.Option(
            "--finetune-budget",
            metavar="TIME",
            help="Of one finetuning of the slower model; both take as many steps. Default: a quarter of --budget.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of random seeds.")] = 3,
    fractions: Annotated[
        str, typer.Option("--label-fractions", metavar="LIST", help="Shares of the labels, besides all of them.")
    ] = "0.1,0.25",
    preset: PresetOption = "auto",
    config: ConfigOption = None,
    set_: SetOption = None,
    device: DeviceOption = None,
    compare: CompareOption = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of results; rerun to continue there.")
    ] = Path("bench-quality"),
    json: JsonOption = False,
) -> None:
    """Pretrain both models for equal time on your images, finetune both and from scratch, compare the scores."""
    from affmae_cli import bench_quality
    from affmae_cli.bench_output import finish
    from affmae_engine.bench import report
    from affmae_engine.bench.quality import tables_of
    from affmae_engine.bench.quality_data import Sources

    old = None if compare is None else report.read_results(compare, "quality")
    plan = bench_quality.make_plan(
        budget=budget,
        finetune_budget=finetune_budget,
        seeds=seeds,
        fractions=fractions,
        preset=preset,
        config=config,
        overrides=set_ or (),
        device=device,
    )
    values = bench_quality.run(plan, Sources(tuple(images), tuple(labels), tuple(unlabelled or ())), out)
    finish(bench_quality.TITLE, values, tables_of(values), folder=out, old=old, json=json)


def _begin(device: str, remarks: Sequence[str]) -> None:
    output.say(device)
    for remark in remarks:
        output.say(remark, label="note", style="bold yellow")


def _names(what: str, given: Sequence[str], known: Sequence[_Name]) -> list[_Name]:
    """The given names in their order, each once.

    Raises:
        ConfigError: one is unknown, or there are none.
    """
    entries = [entry.strip() for entry in given if entry.strip()]
    if not entries:
        raise ConfigError(f"{what} is empty", f"known: {', '.join(known)}")
    found = []
    for entry in entries:
        match = next((name for name in known if name == entry), None)
        if match is None:
            near = get_close_matches(entry, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{what}: unknown name {entry!r}", hint)
        found.append(match)
    return list(dict.fromkeys(found))


def _edges(text: str) -> list[int]:
    """Image edges from a comma-separated list.

    Raises:
        ConfigError: an entry is not a number in range, or not a multiple of the patch.
    """
    from affmae_engine.config import ModelConfig

    patch = ModelConfig().patch_size
    found = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        edge = int(entry) if entry.isascii() and entry.isdigit() else 0
        if not SMALLEST_EDGE <= edge <= LARGEST_EDGE or edge % patch:
            raise ConfigError(
                f"--resolutions must be multiples of {patch} from {SMALLEST_EDGE} to {LARGEST_EDGE}; got {entry!r}"
            )
        found.append(edge)
    if not found:
        raise ConfigError("--resolutions is empty", "give one or more edges in pixels, separated by commas")
    return list(dict.fromkeys(found))
