"""`affmae objects`: single objects from class maps, class probabilities, boundary and distance maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption, OutOption, OverwriteOption, QuietOption, TrustSizesOption
from affmae_cli.pass_progress import showing_passes
from affmae_cli.pixel_size import PixelSizeOption, parse_pixel_size

if TYPE_CHECKING:
    from affmae_engine.objects.decode import DecodeOptions
    from affmae_engine.objects.maps import MapFiles
    from affmae_engine.objects.tune import Tuned

SourcesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE...",
        help="Class map, or probabilities; several volumes of probabilities (orientations) are averaged.",
    ),
]
ClassesOption = Annotated[
    str, typer.Option("--classes", metavar="A,B+C", help="Classes that become objects; B+C are taken as one.")
]
BoundaryOption = Annotated[
    Path | None, typer.Option("--boundary", metavar="PATH", help="Boundary map: high between objects.")
]
BoundaryClassOption = Annotated[
    str, typer.Option("--boundary-class", metavar="NAME", help="Class that is boundary, such as membrane.")
]
MethodOption = Annotated[
    Literal["components", "watershed"] | None,
    typer.Option("--method", help="By default watershed where a boundary or distance map is given, else components."),
]
SectionsOption = Annotated[
    bool | None,
    typer.Option("--sections/--volume", help="Section by section, then linked; or in 3-D. By default by voxel size."),
]
MinSizeOption = Annotated[
    int | None, typer.Option("--min-size", min=1, help="Remove objects of fewer voxels. Default: 20.")
]
MinSpanOption = Annotated[
    int | None, typer.Option("--min-span", min=1, help="Remove objects in fewer sections. Default: 1.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any decoder option, such as seed_distance=4. May be repeated."),
]
ModelOption = Annotated[
    Path | None,
    typer.Option("-m", "--model", metavar="RUN", help="Use (with --tune: store) the options tuned for this model."),
]
TuneOption = Annotated[
    Path | None,
    typer.Option("--tune", metavar="TRUTH", help="Choose the options by these true objects; nothing else is done."),
]
RegionOption = Annotated[
    str | None,
    typer.Option("--region", metavar="Z,Y,X", help="Part to tune on, such as 0:64,0:512,0:512. Default: all of it."),
]
SmallestOption = Annotated[
    int, typer.Option("--score-from", min=1, metavar="VOXELS", help="With --tune: smallest objects that are scored.")
]
ImageOption = Annotated[Path | None, typer.Option("--image", metavar="PATH", help="Image, for an overlay picture.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Processes; 0 takes as many as cores and memory allow.")
]
ShardOption = Annotated[
    str, typer.Option("--shard", metavar="I/N", help="Compute part I of N of one volume, on several machines.")
]
BlockOption = Annotated[
    str | None, typer.Option("--block", metavar="Z,Y,X", help="Voxels of a block. By default by the decoder.")
]


def objects(
    sources: SourcesArgument,
    classes: ClassesOption = "",
    boundary: BoundaryOption = None,
    boundary_class: BoundaryClassOption = "",
    method: MethodOption = None,
    sections: SectionsOption = None,
    min_size: MinSizeOption = None,
    min_span: MinSpanOption = None,
    assignments: SetOption = None,
    model: ModelOption = None,
    tune: TuneOption = None,
    region: RegionOption = None,
    score_from: SmallestOption = 1,
    image: ImageOption = None,
    pixel_size: PixelSizeOption = None,
    workers: WorkersOption = 0,
    shard: ShardOption = "1/1",
    block: BlockOption = None,
    out: OutOption = None,
    trust_sizes: TrustSizesOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make single objects, in volumes larger than memory.

    Objects go to -o: .zarr (OME-Zarr), .tif or .tiff (OME-TIFF, 32 bits); without it to NAME-objects.zarr in the
    working directory. A run that was stopped or killed is continued by the same command.
    """
    from affmae_engine.objects.maps import MapFiles

    files = MapFiles(
        tuple(sources),
        tuple(part.strip() for part in classes.split(",") if part.strip()),
        boundary,
        boundary_class,
        parse_pixel_size(pixel_size) or (None, None, None),
    )
    chosen = _options(files, method, sections, min_size, min_span, assignments or [], model, tuning=tune is not None)
    if tune is not None:
        _tune(files, tune, chosen, region, score_from, model, as_json=as_json, quiet=quiet)
        return

    from dataclasses import asdict

    from affmae_engine.objects import run
    from affmae_engine.predict.outputs import stem
    from affmae_engine.runtime.signals import StopRequest

    target = out or Path(f"{stem(sources[0])}-objects.zarr")
    how = run.RunOptions(_triple(block, "--block"), workers, _shard(shard), overwrite)
    with showing_passes(quiet=quiet) as progress, StopRequest().installed() as stop:
        report = run.run(files, target, chosen, how, image=image, stop=stop, on_progress=progress)
    if as_json:
        output.print_json({**asdict(report), "options": asdict(chosen)})
        return
    if report.output is None:
        output.say(f"shard {shard} is done")
        return
    found = ", ".join(f"{count} {name}" for name, count in report.counts.items())
    output.show(f"{report.output}: {found} ({report.seconds:.1f} s)")
    if report.overlay is not None:
        output.show(f"picture: {report.overlay}")
    if not quiet:
        output.say(f"measure them: affmae measure {report.output}")


def _options(
    files: MapFiles,
    method: Literal["components", "watershed"] | None,
    sections: bool | None,
    min_size: int | None,
    min_span: int | None,
    assignments: list[str],
    model: Path | None,
    *,
    tuning: bool,
) -> DecodeOptions:
    """What was asked, over what was tuned for the model, over what suits the maps."""
    from dataclasses import replace

    from affmae_engine.errors import ConfigError
    from affmae_engine.objects.maps import Maps
    from affmae_engine.objects.run import decode_options, with_values
    from affmae_engine.objects.tune import stored_options

    stored = None if model is None else stored_options(model)
    if model is not None and stored is None and not tuning:
        raise ConfigError(f"no options were tuned for {model}", "leave out -m, or tune them with --tune TRUTH")
    with Maps(files) as maps:
        base = decode_options(maps, stored)
    asked = {"method": method, "sections": sections, "min_voxels": min_size, "min_span": min_span}
    base = replace(base, **{k: v for k, v in asked.items() if v is not None})  # type: ignore[arg-type]  # their own
    return with_values(base, assignments)


def _tune(
    files: MapFiles,
    truth: Path,
    start: DecodeOptions,
    region: str | None,
    smallest: int,
    model: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from dataclasses import asdict

    from affmae_cli.commands.measure import show_object_scores
    from affmae_engine.objects.tune import store_options, tune

    def told(tried: Tuned) -> None:
        if not quiet:
            output.say(f"PQ {tried.scores.pq:.3f}  {tried.changed}")

    tuned = tune(files, truth, start, window=_region(region), smallest=smallest, on_better=told)
    stored = None if model is None else store_options(model, tuned.options, tuned.scores)
    if as_json:
        output.print_json({"options": asdict(tuned.options), "scores": asdict(tuned.scores), "stored": stored})
        return
    show_object_scores(tuned.scores)
    settings = " ".join(f"--set {name}={_text(value)}" for name, value in asdict(tuned.options).items())
    output.show(f"options: {settings}" if stored is None else f"stored in {stored}; used with -m {model}")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _triple(text: str | None, option: str) -> tuple[int, int, int] | None:
    from affmae_engine.errors import ConfigError

    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"{option} {text!r} is not three whole numbers", f"for example {option} 128,128,128")
    z, y, x = (int(part) for part in parts)
    return z, y, x


def _shard(text: str) -> tuple[int, int]:
    """`2/4` as (1, 4)."""
    from affmae_engine.errors import ConfigError

    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"--shard {text!r} is not a part of a whole", "for example --shard 1/4 to --shard 4/4")
    return int(first) - 1, int(count)


def _region(text: str | None) -> tuple[slice, slice, slice] | None:
    """`0:64,0:512,0:512` as slices; an empty end is that of the volume."""
    from affmae_engine.errors import ConfigError

    if text is None:
        return None
    pairs = [part.split(":") for part in text.split(",")]
    if len(pairs) != 3 or not all(
        len(p) == 2 and all(e.strip() == "" or e.strip().isdigit() for e in p) for p in pairs
    ):
        raise ConfigError(f"--region {text!r} is not three ranges", "for example --region 0:64,0:512,0:512")
    z, y, x = (slice(int(a) if a.strip() else None, int(b) if b.strip() else None) for a, b in pairs)
    return z, y, x
