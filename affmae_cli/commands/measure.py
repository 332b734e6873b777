"""`affmae measure`: the objects of a label volume, counted, measured in nm or um, and scored against the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption, OutOption, OverwriteOption, QuietOption, TrustSizesOption
from affmae_cli.pass_progress import showing_passes
from affmae_cli.pixel_size import PixelSizeOption, parse_pixel_size

if TYPE_CHECKING:
    from affmae_engine.objects.measure import ObjectTable
    from affmae_engine.objects.report import ClassSummary
    from affmae_engine.objects.scores import ObjectScores

LabelsArgument = Annotated[
    Path, typer.Argument(metavar="LABELS", help="Label volume with an id per object: TIFF, OME-Zarr, PNG, a folder.")
]
ImageOption = Annotated[Path | None, typer.Option("--image", metavar="PATH", help="Image, for the mean gray values.")]
ClassMapOption = Annotated[
    Path | None, typer.Option("--class-map", metavar="PATH", help="Class map, for the class of each object.")
]
InsideOption = Annotated[
    Path | None,
    typer.Option("--inside", metavar="PATH", help="Second label volume (cells): which of them encloses each object."),
]
TruthOption = Annotated[
    Path | None, typer.Option("--truth", metavar="PATH", help="True labels: the objects are scored against them.")
]
SmallestOption = Annotated[
    int, typer.Option("--score-from", min=1, metavar="VOXELS", help="Smallest true and found objects that are scored.")
]
UnitOption = Annotated[
    Literal["auto", "nm", "um", "px"], typer.Option("--unit", help="Unit of all lengths; `auto` goes by their size.")
]


def measure(
    labels: LabelsArgument,
    image: ImageOption = None,
    class_map: ClassMapOption = None,
    inside: InsideOption = None,
    truth: TruthOption = None,
    score_from: SmallestOption = 1,
    pixel_size: PixelSizeOption = None,
    unit: UnitOption = "auto",
    out: OutOption = None,
    trust_sizes: TrustSizesOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure every object of a label volume of any size.

    The table goes to -o, a .csv file with a row per object; without it to NAME-measurements.csv in the working
    directory. A summary per class is printed. Volumes are read block by block.
    """
    from dataclasses import asdict

    from affmae_engine import atomic
    from affmae_engine.errors import ConfigError
    from affmae_engine.objects.measuring import measure_volume
    from affmae_engine.objects.report import summarize, write_csv
    from affmae_engine.predict.outputs import stem

    target = out or Path(f"{stem(labels)}-measurements.csv")
    if target.suffix.lower() != ".csv":
        raise ConfigError(f"{target}: measurements are written as .csv", "name the output with this extension")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already", "replace it with --overwrite, or choose another -o/--out")

    atomic.ensure_folder(target.parent)
    with showing_passes(quiet=quiet) as progress:
        measured = measure_volume(
            labels, image=image, class_map=class_map, inside=inside, truth=truth,
            pixel_nm=parse_pixel_size(pixel_size), unit=unit, smallest_scored=score_from,
            on_progress=lambda done, blocks: progress("measure", done, blocks),
        )  # fmt: skip
    for note in measured.notes:
        output.say(note, label="note", style="cyan")
    write_csv(target, measured.table)
    summaries = summarize(measured.table)
    if as_json:
        output.print_json(
            {
                "table": target,
                "unit": measured.table.unit,
                "classes": [asdict(summary) for summary in summaries],
                "scores": None if measured.scores is None else asdict(measured.scores),
            }
        )
        return
    show_summary(measured.table, summaries)
    if measured.scores is not None:
        show_object_scores(measured.scores)
    if not quiet:
        output.say(f"{len(measured.table.ids_N)} objects to {target}")


def show_summary(table: ObjectTable, summaries: list[ClassSummary]) -> None:
    """Print a column per class. Means, medians and spreads leave out objects that the border cuts."""
    from rich.table import Table

    size, power = ("area", "2") if table.flat else ("volume", "3")
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("")
    for one in summaries:
        shown.add_column(output.printable(one.class_name), justify="right")

    def row(name: str, value: Callable[[ClassSummary], object]) -> None:
        shown.add_row(name, *(f"{v:.4g}" if isinstance(v := value(one), float) else str(v) for one in summaries))

    row("objects", lambda s: s.objects)
    row("of these at the border", lambda s: s.touching_border)
    row(f"total {size} ({table.unit}{power})", lambda s: s.total_size)
    row(f"mean {size}", lambda s: s.size[0])
    row(f"median {size}", lambda s: s.size[1])
    row(f"mean diameter ({table.unit})", lambda s: s.diameter[0])
    row("median diameter", lambda s: s.diameter[1])
    row("standard deviation", lambda s: s.diameter[2])
    row(f"mean {'circularity' if table.flat else 'sphericity'}", lambda s: s.roundness)
    if any(s.enclosed for s in summaries):
        row("inside another object", lambda s: s.enclosed)
        row("enclosing objects", lambda s: s.hosts)
    output.show(shown)


def show_object_scores(scores: ObjectScores) -> None:
    """Print object scores, one row each."""
    from rich.table import Table

    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_row("objects", f"{scores.predicted_objects} found, {scores.true_objects} true")
    shown.add_row("F1", f"{scores.f1_50:.3f} at IoU 0.5, {scores.f1_75:.3f} at 0.75")
    shown.add_row("AP", f"{scores.ap_50:.3f} at IoU 0.5, {scores.ap_75:.3f} at 0.75")
    shown.add_row("PQ", f"{scores.pq:.3f}")
    shown.add_row("adapted Rand error", f"{scores.adapted_rand_error:.4f}")
    shown.add_row("variation of information", f"{scores.voi_split:.3f} split + {scores.voi_merge:.3f} merge bits")
    output.show(shown)
