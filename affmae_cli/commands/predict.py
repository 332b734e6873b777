"""`affmae predict`: segment images and stacks of any size with a finetuned run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import (
    AxesOption,
    ChannelOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    QuietOption,
    TrustSizesOption,
)
from affmae_cli.pixel_size import PixelSizeOption, VoxelSize, parse_pixel_size

if TYPE_CHECKING:
    from affmae_engine.data.labels.checks import CheckedLabels
    from affmae_engine.data.readers import Source
    from affmae_engine.predict.files import Outcome, Plan
    from affmae_engine.predict.finish import PredictReport
    from affmae_engine.predict.job import PredictOptions
    from affmae_engine.predict.outputs import Outputs
    from affmae_engine.predict.predictor import Predictor
    from affmae_engine.predict.run import Engine
    from affmae_engine.predict.score import Score

_FEW = 4
"""Predictions up to this number are described one by one."""

SourcesArgument = Annotated[
    list[Path], typer.Argument(metavar="SOURCE...", help="Image or stack of any size, a folder of them, patterns.")
]
WhichOption = Annotated[
    Literal["best", "last"], typer.Option("--which", help="Which checkpoint of the run: best held-out, or newest.")
]
RescaleOption = Annotated[
    bool | None,
    typer.Option(
        "--rescale/--no-rescale",
        help="Predict at the training's pixel size; labels keep the input's grid. Default: where the sizes differ by "
        "more than 15 %.",
        show_default=False,
    ),
]
ProbabilitiesOption = Annotated[
    bool, typer.Option("--probabilities", help="Also write class probabilities (OME-Zarr, value / 255).")
]
OverlayOption = Annotated[
    bool, typer.Option("--overlay/--no-overlay", help="Picture of a few sections with their labels.")
]
ImageOption = Annotated[
    bool, typer.Option("--image/--no-image", help="Copy the image into an OME-Zarr, so that it opens with its labels.")
]
SeparateOption = Annotated[
    bool, typer.Option("--separate", help="Numbered sections of a folder as an output each, not as one stack.")
]
TileOption = Annotated[
    int | None, typer.Option("--tile", min=8, help="Edge of a tile in pixels; by default the training image's.")
]
OverlapOption = Annotated[
    float | None, typer.Option("--overlap", min=0, max=0.94, help="Overlap of tiles, as a fraction. Default: 0.5.")
]
TtaOption = Annotated[bool, typer.Option("--tta", help="Average over flips of each tile: four times the work.")]
PlanesOption = Annotated[
    str,
    typer.Option(
        "--planes",
        metavar="xy,xz,yz",
        help="Orientations of the planes; probabilities of several are averaged. For nearly isotropic volumes.",
    ),
]
LabelsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--labels", metavar="PATH", help="True labels of the inputs: the result is scored, in scores.json and .csv."
    ),
]
BatchOption = Annotated[
    int | None, typer.Option("--batch", min=1, help="Tiles per forward pass. Default: what fits the GPU, 4 on a CPU.")
]
_MANY = "Many GPUs and machines"
GpusOption = Annotated[
    str | None, typer.Option("--gpus", metavar="N|all", help="A process for each GPU.", rich_help_panel=_MANY)
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Compute part I (from 0) of N of the blocks of an OME-Zarr; the last process to finish completes it.",
        rich_help_panel=_MANY,
    ),
]
DaskOption = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Submit the blocks to a dask cluster: the scheduler's address or file.",
        rich_help_panel=_MANY,
    ),
]
PlanOption = Annotated[
    bool,
    typer.Option("--plan", help="Print blocks, sizes, expected time and disk, and stop.", rich_help_panel=_MANY),
]
FinishOption = Annotated[
    bool,
    typer.Option("--finish", help="Compute nothing; put finished shards together.", rich_help_panel=_MANY),
]


def predict(
    sources: SourcesArgument,
    model: ModelOption = None,
    out: OutOption = None,
    which: WhichOption = "best",
    rescale: RescaleOption = None,
    pixel_size: PixelSizeOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    labels: LabelsOption = None,
    probabilities: ProbabilitiesOption = False,
    overlay: OverlayOption = True,
    image: ImageOption = True,
    separate: SeparateOption = False,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    tta: TtaOption = False,
    planes: PlanesOption = "xy",
    batch: BatchOption = None,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    shard: ShardOption = None,
    dask: DaskOption = None,
    plan: PlanOption = False,
    finish: FinishOption = False,
    trust_sizes: TrustSizesOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment images and stacks of any size.

    Labels go to -o: a .tif (ImageJ TIFF, BigTIFF above 4 GB), a .zarr (OME-Zarr), or a folder. Without it, to
    predictions/NAME-labels.tif in the working directory. Numbered sections of one size in a folder are one stack. What
    was stopped or killed is continued by the same command, which passes over what is complete. Earlier results and true
    labels that lie in folders are no inputs.
    """
    from affmae_cli.score_table import show_scores
    from affmae_engine.errors import ConfigError
    from affmae_engine.predict.predictor import Predictor, newest_finetune_run

    if sum(each is not None for each in (gpus, shard, dask)) + finish > 1:
        raise ConfigError("--gpus, --shard, --dask and --finish are different ways to do the work", "give one of them")
    if labels and (shard or plan):
        raise ConfigError("--labels cannot score what is not complete", "score with the same command without --shard")
    how = Distribution(gpus, _parsed_shard(shard), dask, finish)
    voxel = parse_pixel_size(pixel_size) or (None, None, None)
    run = model or newest_finetune_run()
    predictor = Predictor.from_weights(run, which=which, device=device or "auto")
    if not quiet:
        output.say(f"model {run} (step {predictor.metadata.step}) on {predictor.choice.description}")
    options = replace(
        _options(predictor, tile, overlap, batch, rescale, voxel),
        tta=tta, planes=_parsed_planes(planes), image=image, overwrite=overwrite,
    )  # fmt: skip
    targets = Targets(out, probabilities=probabilities, overlay=overlay, separate=separate)
    if plan:
        _show_plans(sources, predictor, targets, options, as_json=as_json)
        return
    outcome, scored = segment(sources, predictor, targets, options, labels=labels, how=how, quiet=quiet)
    if as_json:
        output.print_json(_document(outcome, scored, run, predictor))
        return
    _show(outcome, quiet=quiet)
    if scored is not None:
        show_scores({"": scored})


@dataclass(frozen=True)
class Distribution:
    """Who computes. gpus: a process for each of so many. shard: a part of the blocks. dask: address of a scheduler.
    finish: nobody; finished blocks are put together."""

    gpus: str | None = None
    shard: tuple[int, int] | None = None
    dask: str | None = None
    finish: bool = False

    def engine(self, stack: contextlib.ExitStack) -> Engine | None:
        """What computes the blocks; None is this process.

        Raises:
            ConfigError: more GPUs than there are; dask is not installed.
            ResourceError: no scheduler answers.
        """
        if self.gpus is not None:
            from affmae_engine.predict.workers import Workers, gpu_indices

            return stack.enter_context(Workers.on_gpus(gpu_indices(self.gpus)))
        if self.dask is not None:
            from affmae_engine.predict.cluster import Cluster

            return stack.enter_context(Cluster(self.dask))
        return None


@dataclass(frozen=True)
class Targets:
    """What to write and where; None is the default place."""

    out: Path | None
    probabilities: bool = False
    overlay: bool = True
    separate: bool = False


def segment(
    sources: Sequence[Path],
    predictor: Predictor,
    targets: Targets,
    options: PredictOptions,
    *,
    labels: Sequence[Path] | None = None,
    how: Distribution | None = None,
    quiet: bool = False,
) -> tuple[Outcome, Score | None]:
    """Predict with progress on stderr, and score where true labels are given; these are checked first."""
    from affmae_cli.prediction_progress import showing
    from affmae_engine.predict import files
    from affmae_engine.predict.run import Shard, predict
    from affmae_engine.runtime.signals import StopRequest

    how = how or Distribution()
    planned = _planned(sources, predictor, targets, options, labels)
    truth = _truth(sources, planned, labels, predictor) if labels else None
    for source, _ in planned.jobs:
        for question in source.info.questions:
            output.say(f"{source.info.path}: {question}", label="warning", style="bold yellow")
    if not quiet:
        there = f", {len(planned.finished)} finished before" if planned.finished else ""
        count = len(planned.jobs)
        output.say(f"{count} image{'s' * (count != 1)} to {planned.out}{there}")
    with (
        contextlib.ExitStack() as stack,
        showing(len(planned.jobs) + len(planned.refused), quiet=quiet) as view,
        StopRequest(view.on_signal).installed() as stop,
    ):
        engine = how.engine(stack) if planned.jobs else None
        shard = None if how.shard is None else Shard(*how.shard)

        def predict_one(source: Source, outputs: Outputs) -> PredictReport | None:
            return predict(
                source, predictor, outputs, options,
                on_progress=view.progress, stop=stop, shard=shard, engine=engine, finish_only=how.finish,
            )  # fmt: skip

        outcome = files.run(planned, predict_one, on_report=view.report, on_refused=view.refused)
    return outcome, None if truth is None else _scored(planned, outcome, truth, predictor)


def _planned(
    sources: Sequence[Path],
    predictor: Predictor,
    targets: Targets,
    options: PredictOptions,
    labels: Sequence[Path] | None = None,
) -> Plan:
    """The inputs and their outputs."""
    from affmae_engine.predict import files
    from affmae_engine.predict.identity import is_finished

    def finished(source: Source, outputs: Outputs) -> bool:
        return is_finished(source, predictor, outputs, options)

    return files.plan(
        sources,
        targets.out,
        probabilities=targets.probabilities,
        overlay=targets.overlay,
        separate=targets.separate,
        overwrite=options.overwrite,
        protect=[predictor.weights],
        truth=labels or (),
        finished=finished,
    )


def _scored(planned: Plan, outcome: Outcome, truth: CheckedLabels, predictor: Predictor) -> Score:
    """Score everything, also what was finished before, and write the scores beside the output."""
    from affmae_engine.predict.score import Predicted, TrainedOn, score, write_scores
    from affmae_engine.predict.sources import described

    predictions = [Predicted(described(source), outputs.labels) for source, outputs in outcome.finished]
    predictions += [Predicted(report.sections, report.labels) for report in outcome.reports]
    found = score(predictions, truth, TrainedOn.of_weights(predictor.weights))
    folder = planned.out if planned.out.is_dir() and planned.out.suffix != ".zarr" else planned.out.parent
    about = {"weights": str(predictor.weights), "step": predictor.metadata.step}
    document, table = write_scores(folder, found, about)
    output.say(f"scores: {document}, {table.name}")
    if found.trained_on:
        names = ", ".join(found.trained_on[:_FEW]) + (" ..." if len(found.trained_on) > _FEW else "")
        text = f"the model was trained on some of what is scored, so the scores are too good: {names}"
        output.say(text, label="warning", style="bold yellow")
    return found


def _parsed_shard(text: str | None) -> tuple[int, int] | None:
    """`0/3` as (0, 3).

    Raises:
        ConfigError: something else, or a number out of range.
    """
    from affmae_engine.errors import ConfigError

    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise ConfigError(f"--shard {text!r} is not of the form I/N", "give for example --shard 0/8 to --shard 7/8")
    if int(index) >= int(count):
        raise ConfigError(f"--shard {text}: there is no such part", f"parts of {count} are 0 to {int(count) - 1}")
    return int(index), int(count)


def _parsed_planes(text: str) -> tuple[str, ...]:
    """`xy,xz` as ("xy", "xz").

    Raises:
        ConfigError: an unknown orientation, or one twice.
    """
    from affmae_engine.errors import ConfigError
    from affmae_engine.predict.sources import ORIENTATIONS

    planes = tuple(part.strip() for part in text.split(","))
    if len(set(planes)) < len(planes) or not set(planes) <= set(ORIENTATIONS):
        raise ConfigError(f"--planes {text!r}: orientations are {', '.join(ORIENTATIONS)}, each at most once")
    return planes


def _show_plans(
    sources: Sequence[Path], predictor: Predictor, targets: Targets, options: PredictOptions, *, as_json: bool
) -> None:
    """What the work would be. The rate is measured here, on the network alone."""
    from dataclasses import asdict

    from affmae_engine.errors import human_bytes
    from affmae_engine.predict.plan import planned_work
    from affmae_engine.runtime.formatting import duration

    planned = _planned(sources, predictor, targets, options)
    found = [planned_work(source, predictor, outputs, options) for source, outputs in planned.jobs]
    if as_json:
        output.print_json({"plans": [asdict(each) for each in found], "finished": len(planned.finished)})
        return
    for each in found:
        size, block = (" x ".join(map(str, shape)) for shape in (each.shape_ZYX, each.block_ZYX))
        output.show(f"{each.source} ({size}) -> {each.labels}")
        output.show(f"  blocks   {each.blocks} of {block} voxels, {each.blocks_finished} finished")
        output.show(f"  tiles    {each.tiles} of {each.tile} pixels, {each.batch} at a time")
        rate = f"{each.tiles_per_s:.3g} tiles/s measured on {predictor.choice.description}"
        output.show(f"  network  {duration(each.seconds)} on one device like this one ({rate})")
        free = human_bytes(each.free_bytes)
        output.show(f"  disk     about {human_bytes(each.disk_bytes)} needed, {free} free")
    if planned.finished:
        output.show(f"{len(planned.finished)} finished before")


def _truth(sources: Sequence[Path], planned: Plan, labels: Sequence[Path], predictor: Predictor) -> CheckedLabels:
    """The true labels of what was planned; where they do not fit, inputs that were passed over may be why."""
    from affmae_engine.errors import InputError
    from affmae_engine.predict.score import read_truth

    known = predictor.metadata
    try:
        return read_truth(
            sources, labels, class_names=known.class_names, ignore_label=known.ignore_label, files=planned.files
        )
    except InputError as error:
        if not planned.refused:
            raise
        count, first = len(planned.refused), planned.refused[0].reason
        passed_over = f"passed over before: {count} input{'s' * (count != 1)}, the first: {first}"
        raise InputError(f"{error.message}\n{passed_over}", error.hint) from error


def _options(
    predictor: Predictor,
    tile: int | None,
    overlap: float | None,
    batch: int | None,
    rescale: bool | None,
    pixel_nm: VoxelSize,
) -> PredictOptions:
    """What was asked, over what the run was configured with."""
    from pydantic import ValidationError

    from affmae_engine.config import PredictConfig
    from affmae_engine.errors import CorruptError
    from affmae_engine.predict.job import PredictOptions

    trained = predictor.metadata.config.get("predict", {})
    known = {key: trained[key] for key in PredictConfig.model_fields if key in trained}
    try:
        defaults = PredictConfig.model_validate(known)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise CorruptError(f"{predictor.weights}: its [predict] settings: {problem}", "was it edited?") from error
    return PredictOptions(
        tile=tile or defaults.tile,
        overlap=defaults.overlap if overlap is None else overlap,
        batch_size=batch,
        rescale=rescale,
        pixel_nm=pixel_nm,
    )


def _document(outcome: Outcome, scored: Score | None, run: Path, predictor: Predictor) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "model": run,
        "weights": predictor.weights,
        "step": predictor.metadata.step,
        "device": predictor.choice.description,
        "class_names": predictor.metadata.class_names,
        "finished": [outputs.labels for _, outputs in outcome.finished],
        "waiting": outcome.waiting,
        "predictions": [asdict(report) for report in outcome.reports],
        "refused": [asdict(problem) for problem in outcome.refused],
        "score": None if scored is None else asdict(scored),
    }


def _show(outcome: Outcome, *, quiet: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    many = len(outcome.reports) > _FEW
    blocks = [_described(outcome.reports)] if many else [_described([report]) for report in outcome.reports]
    for block in blocks:
        for name, value in block.items():
            if value:
                table.add_row(Text(name, style="bold"), Text(output.printable(value), overflow="fold"))
    if outcome.reports:
        output.show(table)
    if outcome.finished:
        output.show(f"{len(outcome.finished)} finished before, {len(outcome.reports)} predicted now")
    for path in outcome.waiting:
        output.show(output.printable(f"{path}: this part is done; others are not complete yet"))
    if outcome.refused:
        output.show(f"{len(outcome.reports)} predicted, {len(outcome.refused)} passed over (named above)")
    if outcome.reports and not quiet:
        output.say(output.printable(_how_to_open(outcome.reports[0].labels)), label="open", style="bold cyan")


def _how_to_open(labels: Path) -> str:
    """One line on how to look at labels in Fiji and in napari."""
    from shlex import quote

    if labels.suffix.lower() == ".zarr":
        from affmae_engine.predict.volume import has_image, labels_group

        shown, what = (labels, " (image and labels)") if has_image(labels) else (labels_group(labels), "")
        return (
            f"napari --plugin napari-ome-zarr {quote(str(shown))}{what}; in Fiji: File > Import > "
            f"HDF5/N5/Zarr/OME-NGFF Viewer, {shown.resolve()}"
        )
    return f"in Fiji: File > Open, {labels.resolve()} (colors are set); or napari {quote(str(labels))}"


def _described(reports: Sequence[PredictReport]) -> dict[str, str]:
    """One prediction, or several as one, in words."""
    from math import prod

    first, pixels = reports[0], [prod(report.shape_ZYX) for report in reports]
    shares = {
        name: sum(report.class_fractions[name] * count for report, count in zip(reports, pixels, strict=True))
        for name in first.class_fractions
    }
    seconds = sum(report.seconds for report in reports)
    sizes = ["?" if size is None else f"{size:g}" for size in first.pixel_nm]
    alone = len(reports) == 1
    same_shape = len({report.shape_ZYX for report in reports}) == 1
    same_size = len({report.pixel_nm for report in reports}) == 1
    return {
        "labels": f"{first.labels if alone else f'{first.labels} ... {reports[-1].labels.name}'} ({first.format})",
        "images": "" if alone else str(len(reports)),
        "shape": f"{' x '.join(map(str, first.shape_ZYX)) if same_shape else 'various'} (z, y, x), {first.dtype}",
        "pixel size": f"{', '.join(sizes) if same_size else 'various'} nm (z, y, x)",
        "classes": ", ".join(f"{name} {share / sum(pixels):.1%}" for name, share in shares.items()),
        "time": f"{seconds:.1f} s, {sum(pixels) / 1e6 / seconds:.3g} Mpx/s",
        "probabilities": str(first.probabilities or "") if alone else "",
        "overlay": str(first.overlay or "") if alone else "",
    }
