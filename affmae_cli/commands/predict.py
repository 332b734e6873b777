"""`affmae predict`: segment images and stacks of any size with a finetuned run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import DeviceOption, JsonOption, ModelOption, OutOption, OverwriteOption, QuietOption
from affmae_engine.errors import ConfigError

if TYPE_CHECKING:
    from affmae_engine.predict.files import Outcome
    from affmae_engine.predict.predictor import Predictor


SourcesArgument = Annotated[
    list[Path], typer.Argument(metavar="SOURCE...", help="Image or stack of any size, a folder of them, patterns.")
]
WhichOption = Annotated[
    Literal["best", "last"], typer.Option("--which", help="Which checkpoint of the run: best held-out, or newest.")
]
RescaleOption = Annotated[
    bool, typer.Option("--rescale", help="Predict at the training's pixel size; labels keep the input's grid.")
]
PixelSizeOption = Annotated[
    str | None, typer.Option("--pixel-size", metavar="Z,Y,X", help="Voxel size in nm, in place of what the file says.")
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
BatchOption = Annotated[int | None, typer.Option("--batch", min=1, help="Tiles per forward pass. Default: 4.")]


def predict(
    sources: SourcesArgument,
    model: ModelOption = None,
    out: OutOption = None,
    which: WhichOption = "best",
    rescale: RescaleOption = False,
    pixel_size: PixelSizeOption = None,
    probabilities: ProbabilitiesOption = False,
    overlay: OverlayOption = True,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    batch: BatchOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment images and stacks of any size, section by section.

    Labels go to -o: a .tif (ImageJ TIFF, BigTIFF above 4 GB), a .zarr (OME-Zarr), or a folder. Without it, to
    predictions/NAME-labels.tif in the working directory.
    """
    from affmae_cli.prediction_progress import showing
    from affmae_engine.config import PredictConfig
    from affmae_engine.predict import files
    from affmae_engine.predict.predictor import Predictor, newest_finetune_run
    from affmae_engine.predict.stream import PredictOptions
    from affmae_engine.train.signals import StopRequest

    voxel = _voxel_size(pixel_size)
    run = model or newest_finetune_run()
    predictor = Predictor.from_weights(run, which=which, device=device or "auto")
    planned = files.plan(
        sources, out, probabilities=probabilities, overlay=overlay, overwrite=overwrite, protect=[predictor.weights]
    )
    trained = predictor.metadata.config.get("predict", {})
    defaults = PredictConfig.model_validate({key: trained[key] for key in PredictConfig.model_fields if key in trained})
    options = PredictOptions(
        tile=tile or defaults.tile,
        overlap=defaults.overlap if overlap is None else overlap,
        batch_size=batch or defaults.batch_size,
        rescale=rescale,
        pixel_nm=voxel,
        overwrite=overwrite,
    )
    if not quiet:
        output.say(f"model {run} (step {predictor.metadata.step}) on {predictor.choice.description}")
        output.say(f"{len(planned.jobs)} image{'s' * (len(planned.jobs) != 1)} to {planned.out}")
    with (
        showing(len(planned.jobs) + len(planned.refused), quiet=quiet) as view,
        StopRequest(view.on_signal).installed() as stop,
    ):
        outcome = files.run(
            planned, predictor, options,
            on_progress=view.progress, on_report=view.report, on_refused=view.refused, stop=stop,
        )  # fmt: skip
    if as_json:
        output.print_json(_document(outcome, run, predictor))
    else:
        _show(outcome)


def _voxel_size(text: str | None) -> tuple[float | None, float | None, float | None]:
    if text is None:
        return None, None, None
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        z = y = x = 0.0
    if not all(0 < size < 1e6 for size in (z, y, x)):
        raise ConfigError(f"--pixel-size {text!r} is not three positive numbers", "for example --pixel-size 40,4.6,4.6")
    return z, y, x


def _document(outcome: Outcome, run: Path, predictor: Predictor) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "model": run,
        "weights": predictor.weights,
        "step": predictor.metadata.step,
        "device": predictor.choice.description,
        "class_names": predictor.metadata.class_names,
        "predictions": [asdict(report) for report in outcome.reports],
        "refused": [asdict(problem) for problem in outcome.refused],
    }


def _show(outcome: Outcome) -> None:
    from rich.table import Table
    from rich.text import Text

    for report in outcome.reports:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        sizes = ["?" if size is None else f"{size:g}" for size in report.pixel_nm]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report.class_fractions.items())
        rows = {
            "labels": f"{report.labels} ({report.format})",
            "shape": f"{' x '.join(map(str, report.shape_ZYX))} (z, y, x), {report.dtype}",
            "pixel size": f"{', '.join(sizes)} nm (z, y, x)",
            "classes": shares,
            "time": f"{report.seconds:.1f} s, {report.megapixels_per_s:.3g} Mpx/s",
            "probabilities": str(report.probabilities or ""),
            "overlay": str(report.overlay or ""),
        }
        for name, value in rows.items():
            if value:
                table.add_row(Text(name, style="bold"), Text(output.printable(value), overflow="fold"))
        output.show(table)
    if outcome.refused:
        output.show(f"{len(outcome.reports)} predicted, {len(outcome.refused)} passed over (named above)")
