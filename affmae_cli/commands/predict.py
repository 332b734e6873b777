"""`affmae predict`: segment images and stacks of any size with a finetuned run."""

from __future__ import annotations

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
    from affmae_engine.predict.outputs import Outputs
    from affmae_engine.predict.predictor import Predictor
    from affmae_engine.predict.score import Score
    from affmae_engine.predict.stream import PredictOptions, PredictReport

_FEW = 4
"""Predictions up to this number are described one by one."""

SourcesArgument = Annotated[
    list[Path], typer.Argument(metavar="SOURCE...", help="Image or stack of any size, a folder of them, patterns.")
]
WhichOption = Annotated[
    Literal["best", "last"], typer.Option("--which", help="Which checkpoint of the run: best held-out, or newest.")
]
RescaleOption = Annotated[
    bool, typer.Option("--rescale", help="Predict at the training's pixel size; labels keep the input's grid.")
]
ProbabilitiesOption = Annotated[
    bool, typer.Option("--probabilities", help="Also write class probabilities (OME-Zarr, value / 255).")
]
OverlayOption = Annotated[
    bool, typer.Option("--overlay/--no-overlay", help="Picture of a few sections with their labels.")
]
TileOption = Annotated[
    int | None, typer.Option("--tile", min=8, help="Edge of a tile in pixels; by default the training image's.")
]
OverlapOption = Annotated[
    float | None, typer.Option("--overlap", min=0, max=0.94, help="Overlap of tiles, as a fraction. Default: 0.5.")
]
LabelsOption = Annotated[
    list[Path] | None,
    typer.Option("--labels", metavar="PATH", help="True labels of the inputs: the result is scored (IoU, Dice)."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Keep outputs that this same prediction finished before, do the rest.")
]
BatchOption = Annotated[int | None, typer.Option("--batch", min=1, help="Tiles per forward pass. Default: 4.")]


def predict(
    sources: SourcesArgument,
    model: ModelOption = None,
    out: OutOption = None,
    which: WhichOption = "best",
    rescale: RescaleOption = False,
    pixel_size: PixelSizeOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    labels: LabelsOption = None,
    probabilities: ProbabilitiesOption = False,
    overlay: OverlayOption = True,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    batch: BatchOption = None,
    device: DeviceOption = None,
    trust_sizes: TrustSizesOption = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment images and stacks of any size, section by section.

    Labels go to -o: a .tif (ImageJ TIFF, BigTIFF above 4 GB), a .zarr (OME-Zarr), or a folder. Without it, to
    predictions/NAME-labels.tif in the working directory. A stack that was stopped or killed half way is continued by
    the same command; of a folder, --resume passes over what is complete. Earlier results and true labels that lie in
    folders are no inputs.
    """
    from affmae_cli.score_table import show_scores
    from affmae_engine.errors import ConfigError
    from affmae_engine.predict.predictor import Predictor, newest_finetune_run

    if resume and overwrite:
        raise ConfigError("--resume keeps what --overwrite would replace", "give one of them")
    if resume and labels:
        raise ConfigError("--resume leaves finished images out, so --labels cannot score them all", "give one of them")
    voxel = parse_pixel_size(pixel_size) or (None, None, None)
    run = model or newest_finetune_run()
    predictor = Predictor.from_weights(run, which=which, device=device or "auto")
    if not quiet:
        output.say(f"model {run} (step {predictor.metadata.step}) on {predictor.choice.description}")
    options = replace(_options(predictor, tile, overlap, batch, rescale, voxel), overwrite=overwrite, resume=resume)
    targets = Targets(out, probabilities=probabilities, overlay=overlay)
    outcome, scored = segment(sources, predictor, targets, options, labels=labels, quiet=quiet)
    if as_json:
        output.print_json(_document(outcome, scored, run, predictor))
        return
    _show(outcome)
    if scored is not None:
        show_scores({"": scored})


@dataclass(frozen=True)
class Targets:
    """What to write and where; None is the default place."""

    out: Path | None
    probabilities: bool = False
    overlay: bool = True


def segment(
    sources: Sequence[Path],
    predictor: Predictor,
    targets: Targets,
    options: PredictOptions,
    *,
    labels: Sequence[Path] | None = None,
    quiet: bool = False,
) -> tuple[Outcome, Score | None]:
    """Predict with progress on stderr, and score where true labels are given; these are checked first."""
    from affmae_cli.prediction_progress import showing
    from affmae_engine.errors import Interrupted
    from affmae_engine.predict import files
    from affmae_engine.predict.identity import is_finished
    from affmae_engine.predict.score import score
    from affmae_engine.runtime.signals import StopRequest

    def finished(source: Source, outputs: Outputs) -> bool:
        return is_finished(source, predictor, outputs, options)

    planned = files.plan(
        sources,
        targets.out,
        probabilities=targets.probabilities,
        overlay=targets.overlay,
        overwrite=options.overwrite,
        protect=[predictor.weights],
        truth=labels or (),
        finished=finished if options.resume else None,
    )
    truth = _truth(sources, planned, labels, predictor) if labels else None
    for source, _ in planned.jobs:
        for question in source.info.questions:
            output.say(f"{source.info.path}: {question}", label="warning", style="bold yellow")
    if not quiet:
        there = f", {len(planned.finished)} finished before" if planned.finished else ""
        output.say(f"{len(planned.jobs)} image{'s' * (len(planned.jobs) != 1)} to {planned.out}{there}")
    with (
        showing(len(planned.jobs) + len(planned.refused), quiet=quiet) as view,
        StopRequest(view.on_signal).installed() as stop,
    ):
        try:
            outcome = files.run(
                planned, predictor, options,
                on_progress=view.progress, on_report=view.report, on_refused=view.refused, stop=stop,
            )  # fmt: skip
        except Interrupted as stopped:
            if len(planned.jobs) + len(planned.finished) > 1:  # finished ones would be in the way
                stopped.hint = "run it again with --resume (and without --labels) to go on from there"
            raise
    return outcome, None if truth is None else score(outcome.reports, truth)


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
    rescale: bool,
    pixel_nm: VoxelSize,
) -> PredictOptions:
    """What was asked, over what the run was configured with."""
    from pydantic import ValidationError

    from affmae_engine.config import PredictConfig
    from affmae_engine.errors import CorruptError
    from affmae_engine.predict.stream import PredictOptions

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
        batch_size=batch or defaults.batch_size,
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
        "finished": outcome.finished,
        "predictions": [asdict(report) for report in outcome.reports],
        "refused": [asdict(problem) for problem in outcome.refused],
        "score": None if scored is None else asdict(scored),
    }


def _show(outcome: Outcome) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    blocks = (
        [_described(outcome.reports)] if len(outcome.reports) > _FEW else [_described([r]) for r in outcome.reports]
    )
    for block in blocks if outcome.reports else []:
        for name, value in block.items():
            if value:
                table.add_row(Text(name, style="bold"), Text(output.printable(value), overflow="fold"))
    output.show(table)
    if outcome.finished:
        output.show(f"{len(outcome.finished)} finished before, {len(outcome.reports)} predicted now")
    if outcome.refused:
        output.show(f"{len(outcome.reports)} predicted, {len(outcome.refused)} passed over (named above)")


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
