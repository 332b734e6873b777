"""`affmae finetune`: segmentation from labelled images, from pretrained weights or from scratch."""

from __future__ import annotations

import contextlib
import json as json_module
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from affmae_cli import output
from affmae_cli.options import (
    AxesOption,
    BatchOption,
    ChannelOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    InitFromOption,
    JsonOption,
    NoTuiOption,
    OutOption,
    OverwriteOption,
    PresetOption,
    QuietOption,
    ResumeOption,
    SeedOption,
    SetOption,
    StepsOption,
    TensorBoardOption,
    TrustSizesOption,
)
from affmae_cli.pixel_size import PixelSizeOption, parse_pixel_size
from affmae_cli.processes import several
from affmae_cli.trainer_process import dashboard_wanted, train_in_dashboard
from affmae_engine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rich.table import Table

    from affmae_cli.settings import Resolved
    from affmae_engine.config import RunConfig
    from affmae_engine.data.labels.checks import UnlabeledSections
    from affmae_engine.data.labels.gather import LabelledSet
    from affmae_engine.data.store import Store
    from affmae_engine.run_dir import RunDir
    from affmae_engine.train.finetuning import FinetuneTask
    from affmae_engine.train.trainer import Summary
    from affmae_engine.train.transfer import TransferReport

_UNLABELED_HELP = "Sections without any label among labeled ones: `ignore` or `background`."
_COLORS_HELP = "Colors of classes 0, 1, ... in labels drawn in colors: 000000,ff0000."
_LABELS_HELP = "Label maps named like their images, one stack, or a folder with a folder of binary masks per class."


def finetune(
    images: Annotated[
        list[str] | None, typer.Option("--images", metavar="PATH", help="Files, folder or pattern. May be repeated.")
    ] = None,
    labels: Annotated[list[str] | None, typer.Option("--labels", metavar="PATH", help=_LABELS_HELP)] = None,
    val_images: Annotated[
        list[str] | None, typer.Option("--val-images", metavar="PATH", help="Validate on these; by default a split.")
    ] = None,
    val_labels: Annotated[
        list[str] | None, typer.Option("--val-labels", metavar="PATH", help="Labels of --val-images.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B,C", help="Names of the label values 0, 1, 2, ...")
    ] = None,
    unlabeled_sections: Annotated[
        str | None, typer.Option("--unlabeled-sections", metavar="WHAT", help=_UNLABELED_HELP)
    ] = None,
    label_colors: Annotated[str | None, typer.Option("--label-colors", metavar="A,B,C", help=_COLORS_HELP)] = None,
    init_from: InitFromOption = None,
    pixel_size: PixelSizeOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    rescale: Annotated[
        bool,
        typer.Option(
            "--rescale/--no-rescale",
            help="Bring images whose pixel size differs by more than 15 % to that of the weights, or to the median.",
        ),
    ] = False,
    trust_sizes: TrustSizesOption = False,
    preset: PresetOption = "auto",
    config: ConfigOption = None,
    set_: SetOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    no_tui: NoTuiOption = False,
    tensorboard: TensorBoardOption = False,
) -> None:
    """Learn to segment from labelled images.

    Classes, class weights and the validation part are found from the labels. The result is a run directory that holds
    its data; `affmae predict STACK -m RUN` uses it. In a terminal the dashboard opens; leaving it asks whether to stop
    or go on. With --no-tui Ctrl-C saves a checkpoint and ends. `affmae finetune --resume RUN` goes on from there.
    """
    if dashboard_wanted(no_tui=no_tui or dry_run or several(), quiet=quiet, as_json=json):
        raise typer.Exit(train_in_dashboard())
    if tensorboard:
        from affmae_cli.tensorboard_copy import check_installed

        check_installed()
    flags = {"steps": steps, "epochs": epochs, "batch": batch, "seed": seed, "device": device}
    sources = _Sources(
        images or [],
        labels or [],
        val_images or [],
        val_labels or [],
        pixel_size,
        unlabeled_sections,
        label_colors,
        rescale,
    )
    set_ = [*(set_ or []), *_named_classes(classes)]
    if resume is not None:
        from affmae_cli.resume import refuse_with_resume

        given: dict[str, object] = {"images": images, "labels": labels, "pixel_size": pixel_size}
        given |= {"classes": classes, "unlabeled_sections": unlabeled_sections, "label_colors": label_colors}
        given |= {"rescale": rescale}
        given |= {"val_images": val_images, "val_labels": val_labels}
        given |= {"preset": preset != "auto", "config": config, "out": out}
        refuse_with_resume(**given, init_from=init_from, overwrite=overwrite, dry_run=dry_run)
        run, task = _continued(resume, set_, flags)
    else:
        from affmae_cli.settings import resolve

        resolved = resolve("finetune", preset=preset, config_file=config, overrides=set_, flags=flags, quiet=quiet)
        resolved, note = _follow(resolved, init_from)
        if dry_run:
            from affmae_cli.dry_run import show_dry_run
            from affmae_engine.train.plan import plan_finetuning

            labelled = sources.gather(resolved.config) if sources.images or sources.labels else None
            show_dry_run(resolved, plan_finetuning(resolved.config, labelled), as_json=json)
            return
        if note and not quiet:
            output.say(note)
        run, task = _new(resolved, sources, out, init_from, overwrite=overwrite, quiet=quiet)

    from affmae_cli.progress import watched_trainer

    with watched_trainer(
        run, task, data=run.data, resume=resume is not None, quiet=quiet, tensorboard=tensorboard
    ) as trainer:
        summary = trainer.fit()
    _show(run, summary, task.transfer if resume is None else None, as_json=json, quiet=quiet)


class _Sources:
    """What the user named."""

    def __init__(
        self,
        images: Sequence[str],
        labels: Sequence[str],
        val_images: Sequence[str],
        val_labels: Sequence[str],
        pixel_size: str | None,
        unlabeled_sections: str | None,
        label_colors: str | None,
        rescale: bool,
    ) -> None:
        self.images, self.labels, self.val_images, self.val_labels = images, labels, val_images, val_labels
        self.pixel_nm = parse_pixel_size(pixel_size)
        if unlabeled_sections not in (None, "ignore", "background"):
            raise ConfigError(f"--unlabeled-sections {unlabeled_sections!r}", "choose ignore or background")
        self.unlabeled_sections = cast("UnlabeledSections | None", unlabeled_sections)
        self.colors = label_colors.split(",") if label_colors else []
        self.rescale = rescale

    def files(self) -> list[Path]:
        """What was named, and every image that is found there; what is wrong with it is for `gather` to say."""
        from affmae_engine.data.readers import find_files

        named = [*self.images, *self.labels, *self.val_images, *self.val_labels]
        found = [Path(name).expanduser() for name in named]
        for name in named:
            with contextlib.suppress(InputError):
                found += find_files([name])
        return found

    def gather(self, config: RunConfig) -> LabelledSet:
        """Pair and check everything."""
        from affmae_engine.data.labels.gather import gather_labels

        missing = [name for name, given in (("--images", self.images), ("--labels", self.labels)) if not given]
        if missing:
            raise ConfigError(
                f"finetuning needs {' and '.join(missing)}",
                "affmae finetune --images IMAGES --labels LABELS [--init-from RUN], or --resume RUN",
            )
        return gather_labels(
            self.images,
            self.labels,
            val_images=self.val_images,
            val_labels=self.val_labels,
            class_names=config.finetune.class_names,
            ignore_label=config.finetune.ignore_label,
            unlabeled_sections=self.unlabeled_sections,
            colors=self.colors,
        )


def _to_scale(labelled: LabelledSet, sources: _Sources, init_from: Path | None) -> tuple[LabelledSet, list[str]]:
    """The images at one pixel size where --rescale is given, and what to warn of."""
    from affmae_engine.data.labels.gather import at_scale
    from affmae_engine.data.scale import common_edge_nm, scale_warnings
    from affmae_engine.train.transfer import read_origin

    origin_nm = read_origin(init_from).pixel_nm if init_from is not None else None
    sizes = [sources.pixel_nm or pair.image.info.pixel_nm for pair in labelled.checked.pairs]
    target_nm = common_edge_nm(sizes, origin_nm)
    unknown = sum(size[2] is None for size in sizes)
    warnings = []
    if unknown and origin_nm is not None:
        warnings.append(
            f"the weights were trained at {origin_nm:.4g} nm per pixel, and the pixel size of {unknown} of "
            f"{len(sizes)} images is unknown: give it with --pixel-size Z,Y,X"
        )
    found = scale_warnings(sizes, origin_nm)
    if sources.rescale and target_nm is not None:
        return at_scale(labelled, target_nm, sources.pixel_nm), [*warnings, *(f"{t}: resampled" for t in found)]
    return labelled, [*warnings, *(f"{text}: --rescale brings all to {target_nm:.4g} nm" for text in found)]


def _named_classes(classes: str | None) -> list[str]:
    """`--classes a,b` as the setting that it stands for."""
    if classes is None:
        return []
    names = [name.strip() for name in classes.split(",")]
    if len(names) < 2 or not all(names):
        raise ConfigError(
            f"--classes {classes!r} does not name two classes or more",
            "give all names from value 0 on, for example --classes background,membrane,mitochondria",
        )
    return [f"finetune.class_names={json_module.dumps(names)}"]


def _follow(resolved: Resolved, init_from: Path | None) -> tuple[Resolved, str]:
    """The settings with the model section of the run that gives the weights, and a note on what changed."""
    if init_from is None:
        return resolved, ""
    from affmae_engine.train.transfer import follow_origin, read_origin

    chosen = [path for path, source in resolved.sources.items() if not source.startswith("preset ")]
    config, note = follow_origin(resolved.config, read_origin(init_from), init_from, chosen=chosen)
    changed = {
        f"model.{name}": f"{init_from}"
        for name, value in config.model.model_dump().items()
        if value != getattr(resolved.config.model, name)
    }
    return replace(resolved, config=config, sources={**resolved.sources, **changed}), note


def _new(
    resolved: Resolved,
    sources: _Sources,
    out: Path | None,
    init_from: Path | None,
    *,
    overwrite: bool,
    quiet: bool,
) -> tuple[RunDir, FinetuneTask]:
    """A new run directory with its data, and what is trained in it."""
    from affmae_engine.run_dir import RunDir, create, free_name
    from affmae_engine.runtime.device import pick_device
    from affmae_engine.train.environment import command_line, write_environment

    choice = pick_device(resolved.config.train)
    if out is not None and out.exists() and not overwrite:
        create(out)  # refuses now, not after the labels were read
    if out is not None:
        RunDir(out).refuse_to_replace([*sources.files(), *([init_from] if init_from else [])])
    labelled = sources.gather(resolved.config)
    if not quiet:
        for line in (labelled.summary, *labelled.notes):
            output.say(line)
    for pair in labelled.checked.pairs:
        for question in pair.image.info.questions:
            output.say(f"{pair.name}: {question}", label="warning", style="bold yellow")
    labelled, scale_warnings = _to_scale(labelled, sources, init_from)
    for line in (*labelled.checked.warnings, *scale_warnings):
        output.say(line, label="warning", style="bold yellow")
    run = create(out or free_name(Path("runs"), f"finetune-{Path(sources.images[0]).stem}"), overwrite=overwrite)
    try:
        task, store = _prepare(run, resolved.config, labelled, sources, init_from)
    except BaseException:
        shutil.rmtree(run.data, ignore_errors=True)  # it is not a run yet, and the next attempt starts afresh
        raise
    report = task.transfer
    if report is not None and not quiet:
        output.say(f"weights from {report.source} ({report.task}, step {report.step}):")
        output.console().print(_transfer_table(report))
    command = {
        "line": command_line(),
        "preset": resolved.preset,
        "sources": resolved.sources,
        "init_from": init_from and str(init_from.absolute()),
        "transfer": [vars(group) for group in report.groups()] if report is not None else None,
    }
    # The environment comes first: a folder with a config.toml is a run, and a run knows its data.
    backend = task.config.kernels.backend
    write_environment(run, "finetune", choice, store=store, command=command, backend=backend, split=task.parts)
    run.write_config(task.config, "finetune")
    return run, task


def _prepare(
    run: RunDir, config: RunConfig, labelled: LabelledSet, sources: _Sources, init_from: Path | None
) -> tuple[FinetuneTask, Store]:
    """Collect the labelled images into the run, and make the task of it."""
    from affmae_engine.data.labels.gather import write_labelled_store
    from affmae_engine.runtime.signals import StopRequest
    from affmae_engine.train.finetuning import FinetuneTask

    with StopRequest().installed() as stop:
        store, val_names = write_labelled_store(
            labelled,
            run.data,
            pixel_nm=None if sources.rescale else sources.pixel_nm,
            should_stop=lambda: stop.requested,
        )
    found: dict[str, object] = {"ignore_label": labelled.checked.ignore_label}
    found |= {"val_images": val_names} if val_names else {}
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update=found)})
    return FinetuneTask(config, store, init_from=init_from), store


def _continued(root: Path, set_: list[str] | None, flags: dict[str, Any]) -> tuple[RunDir, FinetuneTask]:
    """The run to resume, and what is trained in it."""
    from affmae_cli.resume import resolve_continuation
    from affmae_engine.data.holdout import split_labelled
    from affmae_engine.data.store import Store
    from affmae_engine.run_dir import open_run
    from affmae_engine.train.environment import check_same_data, recorded_origin, recorded_split, recorded_task
    from affmae_engine.train.finetuning import FinetuneTask
    from affmae_engine.train.resume import check_length

    run = open_run(root)
    if recorded_task(run) == "pretrain":
        raise ConfigError(f"{root} is not a finetune run", f"continue it with: affmae pretrain --resume {root}")
    asked = resolve_continuation(run, "finetune", overrides=set_, flags=flags)
    store = Store.open(run.data)
    check_same_data(run, store)
    parts = recorded_split(run) or split_labelled(asked, store, by_class=False)
    task = FinetuneTask(asked, store, init_from=recorded_origin(run), parts=parts)
    check_length(run, task.config.train.steps)
    return run, task


def _transfer_table(report: TransferReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("part", "outcome", "tensors", "numbers", "why"):
        table.add_column(column, justify="right" if column in ("tensors", "numbers") else "left")
    styles = {"loaded": "green", "adapted": "cyan", "skipped": "yellow", "missing": "yellow"}
    for group in report.groups():
        outcome = Text(group.outcome, style=styles[group.outcome])
        table.add_row(Text(group.part), outcome, f"{group.tensors}", f"{group.parameters:,}", Text(group.reason))
    return table


def _show(run: RunDir, summary: Summary, report: TransferReport | None, *, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from affmae_cli.score_table import show_scores
    from affmae_engine.events import best_evaluation
    from affmae_engine.predict.score import Score
    from affmae_engine.runtime.formatting import duration, number

    best = best_evaluation(run.metrics)
    if as_json:
        transfer = [vars(group) for group in report.groups()] if report is not None else None
        per_class = best.per_class if best is not None else {}
        output.print_json({"run": run.root, **asdict(summary), "per_class": per_class, "transfer": transfer})
        return
    if best is not None:
        show_scores({"": Score(best.metrics["iou"], best.metrics["dice"], best.per_class, {})})
    score = f", best mean IoU {number(best.metrics['iou'])} at step {best.step}" if best is not None else ""
    output.show(f"{run.root}: {summary.step} steps in {duration(summary.seconds)}{score}")
    if not quiet:
        output.say(f"affmae predict STACK -m {run.root}", label="next", style="bold cyan")
