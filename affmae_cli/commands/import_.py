"""`affmae import`: checkpoints of the published AFFMAE implementation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption, OverwriteOption, QuietOption

if TYPE_CHECKING:
    from affmae_engine.data.normalise import Normalisation


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint: .safetensors, or .pth of weights.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="PATH", help="A .safetensors or .zip file, or a folder (model package)."),
    ],
    mean: Annotated[
        float | None, typer.Option("--mean", help="Mean that images were normalized with, in their intensities.")
    ] = None,
    std: Annotated[
        float | None, typer.Option("--std", help="Standard deviation that images were normalized with.")
    ] = None,
    pixel_nm: Annotated[
        float | None, typer.Option("--pixel-nm", min=1e-3, max=1e9, help="Edge of a training pixel in nm, if known.")
    ] = None,
    class_names: Annotated[
        str | None, typer.Option("--class-names", metavar="A,B,...", help="Of a segmenter, in label order.")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a checkpoint of the published AFFMAE implementation.

    The result can be used like a run: --init-from OUT, and -m OUT if it is a segmenter. Sizes are read from the
    tensors; unknown or missing ones are errors. Without --mean and --std a terminal asks for them; without an answer,
    every image is normalized by its own mean and deviation.
    """
    from affmae_engine import atomic, model_package
    from affmae_engine.errors import ConfigError

    if (mean is None) != (std is None):
        raise ConfigError("--mean and --std belong together", "give both of them, or none")
    model_package.refuse_existing(out, replace=overwrite)
    from affmae_engine.published import convert, read_published
    from affmae_engine.share import converted_content
    from affmae_engine.weights import write_weights

    converted = convert(read_published(file))
    if mean is None and not json and not quiet and sys.stdin is not None and sys.stdin.isatty():
        mean, std = _asked()
    names = tuple(name.strip() for name in class_names.split(",")) if class_names else ()
    normalisation = _normalisation(mean, std, quiet=quiet)
    metadata = converted.metadata(normalisation, pixel_nm=pixel_nm, class_names=names)
    if out.suffix == ".safetensors":
        atomic.ensure_folder(out.parent)
        atomic.commit_file(out, lambda partial: write_weights(partial, converted.weights, metadata))
    else:
        with converted_content(file.stem, converted.weights, metadata, f"published checkpoint {file.name}") as content:
            content.write(out, overwrite=overwrite)
    parameters = sum(tensor.numel() for tensor in converted.weights.values())
    if json:
        model = converted.config.model.model_dump(mode="json")
        output.print_json(
            {
                "out": out, "task": converted.task, "parameters": parameters, "classes": metadata.class_names,
                "model": model, "normalisation": metadata.normalisation, "dropped": converted.dropped,
                "unused_settings": converted.unused,
            }
        )  # fmt: skip
        return
    what = "autoencoder" if converted.task == "pretrain" else f"segmenter of {converted.classes} classes"
    output.show(f"{out}: {what}, {parameters:,} parameters")
    if quiet:
        return
    if converted.dropped:
        output.say(f"left out {len(converted.dropped)} parameters without effect: {_list(converted.dropped)}")
    if converted.unused:
        output.say(f"settings without effect here: {_list(converted.unused)}")
    then = f"affmae predict STACK -m {out}"
    if converted.task == "pretrain":
        then = f"affmae finetune --images IMAGES --labels LABELS --init-from {out}"
    output.say(then, label="next", style="bold cyan")


def _asked() -> tuple[float | None, float | None]:
    """Mean and standard deviation, typed by the user; None where just Enter was pressed."""
    output.say("Which mean and standard deviation were images normalized with, in the intensities of their files?")
    output.say("Press Enter to normalize every image by its own.")
    mean = typer.prompt("mean", default="", show_default=False, err=True)
    if not mean:
        return None, None
    return _number(mean), _number(typer.prompt("standard deviation", err=True))


def _number(text: str) -> float:
    from affmae_engine.errors import ConfigError

    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a number", "type a number, such as 0.5") from error


def _normalisation(mean: float | None, std: float | None, *, quiet: bool) -> Normalisation:
    import math

    from affmae_engine.data.normalise import Normalisation
    from affmae_engine.errors import ConfigError

    if mean is None or std is None:
        if not quiet:
            output.say(
                "without --mean and --std every image is normalized by its own mean and deviation", label="warning",
                style="yellow",
            )  # fmt: skip
        return Normalisation()
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ConfigError(f"--mean {mean} --std {std} cannot be used", "std must be above 0")
    return Normalisation("dataset", mean, std)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
