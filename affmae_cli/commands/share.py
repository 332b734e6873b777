"""`affmae share`: a trained model as one folder or file for others, or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption, OverwriteOption, QuietOption

if TYPE_CHECKING:
    from affmae_engine.share import Content


def share(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="Run, checkpoint, weights file or model package.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FOLDER|FILE.zip", help="The model package to write.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the model; by default that of the run.")] = "",
    author: Annotated[list[str] | None, typer.Option("--author", help="An author's name. May be repeated.")] = None,
    license_: Annotated[str, typer.Option("--license", help="License of the weights, such as CC-BY-4.0.")] = "",
    data_license: Annotated[str, typer.Option("--data-license", help="License of the training data.")] = "",
    cite: Annotated[str, typer.Option("--cite", help="How to cite the model.")] = "",
    example: Annotated[
        list[Path] | None,
        typer.Option("--example", metavar="IMAGE", help="Show this image with its prediction. May be repeated."),
    ] = None,
    which: Annotated[
        Literal["best", "last"], typer.Option("--which", help="Which checkpoint: best held-out, or newest.")
    ] = "best",
    export: Annotated[bool, typer.Option("--export", help="Add a program for torch.export (model.pt2).")] = False,
    bioimageio: Annotated[
        bool, typer.Option("--bioimageio", help="Make the package a BioImage.IO model too (-o FILE.zip).")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Publish on the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a private repository.")] = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Package a trained model for others: weights, settings, classes, pixel size, scores and a model card.

    The package holds no training images, file names or paths. It is used wherever a model is named: -m PACKAGE,
    --init-from PACKAGE, -m hf:ORG/NAME.
    """
    from affmae_engine import model_package
    from affmae_engine.errors import ConfigError

    if out is None and push is None:
        raise ConfigError("nowhere to write the model package", "name it with -o FOLDER or -o FILE.zip, or use --push")
    if private and push is None:
        raise ConfigError("--private goes with --push", "add --push ORG/NAME, or leave --private out")
    if bioimageio and (out is None or out.suffix != ".zip"):
        raise ConfigError("a BioImage.IO model is a ZIP file", "name it with -o FILE.zip")
    if out is not None:
        model_package.refuse_existing(out, replace=overwrite)
    if push is not None:
        push = push.removeprefix(model_package.HUB_SCHEME)
        from affmae_engine.hub import check_installed

        model_package.hub_name(Path(f"{model_package.HUB_SCHEME}{push}"))
        check_installed()
    from affmae_engine.share import Description, model_content

    description = Description(name, tuple(author or ()), license_, data_license, cite, tuple(example or ()))
    done: dict[str, Any] = {}
    with model_content(model, description, which=which, export=export, bioimageio=bioimageio) as content:
        done["differences"] = content.differences
        if out is not None:
            about = content.write(out, overwrite=overwrite)
            done |= {"package": out, "model": about.model_dump()}
        if push is not None:
            done["url"] = _publish(content, push, private=private)
    if bioimageio and out is not None:
        from affmae_engine.bioimageio import validate

        done["bioimageio"] = validate(out)
    if json:
        output.print_json(done)
        return
    for file, difference in content.differences.items():
        output.show(f"{file}: differs from the network by at most {difference:.1g} in a probability")
    if "bioimageio" in done:
        output.show(f"BioImage.IO: {done['bioimageio']}")
    for place in ("package", "url"):
        if place in done:
            output.show(f"{done[place]}")
    if not quiet:
        where = out if out is not None else f"{model_package.HUB_SCHEME}{push}"
        output.say(f"affmae predict STACK -m {where}", label="next", style="bold cyan")


def _publish(content: Content, name: str, *, private: bool) -> str:
    import tempfile

    from affmae_engine.hub import upload

    with tempfile.TemporaryDirectory(prefix="affmae-") as folder:
        content.write(Path(folder) / "package")
        return upload(Path(folder) / "package", name, private=private)
