"""Model packages for others: what is in one, and the model card. `model_package` defines the files.

A package holds the weights with everything that prediction needs, scores, and what its author says of licenses and how
to cite. It never holds images of the training data, names of files, or paths; example pictures are made only of images
that the author names for it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w

from affmae_engine import model_package as package
from affmae_engine.api import load
from affmae_engine.checkpoint import load_weights
from affmae_engine.config import ModelConfig
from affmae_engine.errors import ConfigError
from affmae_engine.events import best_evaluation
from affmae_engine.model.sizes import size_of
from affmae_engine.objects_options import stored_record
from affmae_engine.picture_files import save_png
from affmae_engine.run_dir import RunDir
from affmae_engine.visualize import overlay
from affmae_engine.weights import WeightsMetadata, write_weights

PAPER = "AFFMAE: Scalable and Efficient Vision Pretraining for Desktop Graphics Cards"
PAPER_URL = "https://arxiv.org/abs/2602.16249"
EXAMPLE_EDGE = 512
"""Largest edge of an example picture, in pixels of the image."""
_PRIVATE = {"finetune": ("val_images",)}
"""Settings that name the author's files."""


@dataclass(frozen=True)
class Description:
    """What the author says about a model.

    name: of the model; empty: that of the run. authors: their names. license: of the weights, data_license: of the
    training data, as SPDX identifiers or in words. cite: how to cite. examples: images to show with their prediction.
    """

    name: str = ""
    authors: tuple[str, ...] = ()
    license: str = ""
    data_license: str = ""
    cite: str = ""
    examples: tuple[Path, ...] = ()

    def over(self, earlier: package.ModelAbout) -> Description:
        """With what an earlier package says where this says nothing."""
        fields = ("name", "license", "data_license", "cite")
        return replace(self, **{name: getattr(self, name) or getattr(earlier, name) for name in fields})


@dataclass(frozen=True)
class Content:
    """A package before its list of files is made. folder: its files. about: fields of model.json. differences: of
    exported programs from the network, by file."""

    folder: Path
    about: dict[str, Any]
    differences: dict[str, float] = field(default_factory=dict)

    def write(self, out: Path, *, overwrite: bool = False) -> package.ModelAbout:
        """Write the package as a folder, or as a ZIP file where `out` ends in .zip.

        Raises:
            ConfigError: something is there already.
            ResourceError: it cannot be written.
        """
        return package.write(out, self.folder, self.about, replace=overwrite)


@contextmanager
def model_content(
    model: Path,
    description: Description,
    *,
    which: Literal["best", "last"] = "best",
    export: bool = False,
    bioimageio: bool = False,
) -> Iterator[Content]:
    """The files of a model's package, in a temporary folder.

    Args:
        model: a run, checkpoint, weights file or package.
        description: what the author says.
        which: of a run, the checkpoint with the best score, or the newest.
        export: add the program that `torch.export` makes.
        bioimageio: add what BioImage.IO needs.

    Raises:
        InputError: no such model; an example that cannot be read; a pretrained network where classes are needed.
        ConfigError: exporting a ViT.
        AffmaeError: an exported program does not agree with the network.
    """
    metadata, tensors = load_weights(model, which=which)
    with tempfile.TemporaryDirectory(prefix="affmae-") as temporary:
        folder = Path(temporary) / "content"
        folder.mkdir()
        public = without_private(metadata)
        write_weights(folder / package.WEIGHTS, tensors, public)
        (folder / package.SETTINGS).write_text(_settings_toml(public), "utf-8")
        # What a package that is shared again says of itself stays, unless its author says otherwise now.
        earlier = package.described(model)
        if earlier is not None:
            description = description.over(earlier)
        name = description.name or _plain_name(model)
        about = {
            "name": name,
            "affmae": _version(),
            "scores": earlier.scores if earlier is not None else _scores(RunDir(model), metadata.step),
            "objects": earlier.objects if earlier is not None else stored_record(model) or {},
            "license": description.license,
            "data_license": description.data_license,
            "cite": description.cite,
            "source": earlier.source if earlier is not None else "",
        }
        pictures = _examples(folder, description.examples)
        differences = {}
        if export or bioimageio:
            from affmae_engine.export import export as exported_from

            exported = exported_from(folder / package.WEIGHTS)
            if export:
                exported.save_program(folder / package.EXPORTED)
                differences[package.EXPORTED] = exported.difference
        parameters = sum(tensor.numel() for tensor in tensors.values())
        (folder / package.CARD).write_text(model_card(about, public, parameters, description, pictures), "utf-8")
        if bioimageio:
            from affmae_engine.bioimageio import add_bioimageio

            differences |= add_bioimageio(folder, name, public, exported, description)
        yield Content(folder, about, differences)


@contextmanager
def converted_content(name: str, weights: dict[str, Any], metadata: WeightsMetadata, source: str) -> Iterator[Content]:
    """The files of a package of converted weights, in a temporary folder.

    Args:
        weights: tensors by parameter name.
        source: what they were converted from, in words.
    """
    with tempfile.TemporaryDirectory(prefix="affmae-") as temporary:
        folder = Path(temporary) / "content"
        folder.mkdir()
        write_weights(folder / package.WEIGHTS, weights, metadata)
        (folder / package.SETTINGS).write_text(_settings_toml(metadata), "utf-8")
        about = {"name": name, "affmae": _version(), "source": source}
        parameters = sum(tensor.numel() for tensor in weights.values())
        (folder / package.CARD).write_text(model_card(about, metadata, parameters, Description(), []), "utf-8")
        yield Content(folder, about)


def without_private(metadata: WeightsMetadata) -> WeightsMetadata:
    """The metadata without settings that name the author's files."""
    config = {
        section: {name: value for name, value in values.items() if name not in _PRIVATE.get(section, ())}
        for section, values in metadata.config.items()
    }
    return metadata.model_copy(update={"config": config})


def model_card(
    about: dict[str, Any],
    metadata: WeightsMetadata,
    parameters: int,
    description: Description,
    pictures: Sequence[str],
) -> str:
    """README.md of a package: a table of facts, how to use it, scores, licenses; with the Hub's header of tags."""
    segmenter = metadata.task == "finetune"
    tags = ["electron-microscopy", "affmae", "image-segmentation" if segmenter else "masked-autoencoder"]
    spdx = re.fullmatch(r"[A-Za-z0-9.+-]+", description.license)
    header = {
        "library_name": "affmae",
        "tags": tags,
        **({"pipeline_tag": "image-segmentation"} if segmenter else {}),
        **({"license": description.license.lower() if spdx else "other"} if description.license else {}),
    }
    facts = {
        "task": "segmentation" if segmenter else "pretrained encoder and decoder (no classes yet)",
        "network": _network(metadata),
        "parameters": f"{parameters:,}",
        "classes": ", ".join(f"{value} {name}" for value, name in enumerate(metadata.class_names)),
        "pixel size of the training data": f"{metadata.pixel_nm:g} nm" if metadata.pixel_nm else "not recorded",
        "normalization": _normalization(metadata.normalisation),
        "training image": f"{metadata.image_size} x {metadata.image_size} pixels",
        "training steps": f"{metadata.step:,}" if metadata.step else "",
        "converted from": about.get("source", ""),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {about['name']}", "", "A model for electron microscopy, made with affmae.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    lines += ["", "## Use", "", "```", *_usage(segmenter), "```", ""]
    scores = about.get("scores") or {}
    if scores:
        lines += ["## Held-out scores", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {value:.4g} |" for name, value in scores["metrics"].items()]
        for name, own in scores["per_class"].items():
            lines += [f"| {_cell(name)} | " + ", ".join(f"{key} {value:.4g}" for key, value in own.items()) + " |"]
        lines += ["", "Measured by the author on the data set aside in training.", ""]
    if pictures:
        lines += ["## Examples", "", *(f"![Prediction on an image of the author's]({name})" for name in pictures), ""]
    lines += ["## License and citation", ""]
    lines += [f"Authors: {', '.join(description.authors)}", ""] if description.authors else []
    lines += [f"Weights: {description.license or 'the author stated no license'}", ""]
    lines += [f"Training data: {description.data_license or 'the author stated no license'}", ""]
    lines += [f"Please cite: {description.cite}", ""] if description.cite else []
    lines += [f"Method: {PAPER}, {PAPER_URL}", ""]
    return "\n".join(lines)


def _usage(segmenter: bool) -> list[str]:
    if segmenter:
        return ["affmae predict stack.tif -m PACKAGE", "", "import affmae_engine as affmae",
                'labels = affmae.load("PACKAGE").predict(array, pixel_size=(30, 5, 5))']  # fmt: skip
    return ["affmae finetune --images IMAGES --labels LABELS --init-from PACKAGE", "", "import affmae_engine as affmae",
            'features = affmae.load("PACKAGE").embed(array)']  # fmt: skip


def _network(metadata: WeightsMetadata) -> str:
    model = ModelConfig.model_validate(metadata.model)
    if model.family != "affmae":
        return f"ViT-MAE, {model.size}, patches of {model.patch_size} pixels"
    size = size_of(model)
    return (
        f"AFFMAE, widths {'-'.join(map(str, size.dims))}, depths {'-'.join(map(str, size.depths))}, "
        f"merging {model.merging}, patches of {model.patch_size} pixels"
    )


def _normalization(record: dict[str, Any]) -> str:
    text = "zero mean and unit variance of each image"
    if record.get("mode") == "dataset":
        text = f"mean {record.get('mean'):g}, standard deviation {record.get('std'):g}"
    return f"{text}, CLAHE" if record.get("clahe") else text


def _cell(text: str) -> str:
    """Text from outside inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _settings_toml(metadata: WeightsMetadata) -> str:
    def known(value: Any) -> Any:
        return {k: known(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    return tomli_w.dumps(known(metadata.config or {"model": metadata.model}))


def _scores(run: RunDir, step: int) -> dict[str, Any]:
    """Held-out scores of the checkpoint, where the run recorded them."""
    best = best_evaluation(run.metrics) if run.metrics.is_file() else None
    if best is None or best.step != step:
        return {}
    return {"metrics": _known(best.metrics), "per_class": {name: _known(own) for name, own in best.per_class.items()}}


def _known(scores: Mapping[str, float]) -> dict[str, float]:
    """Without those that do not exist, such as the IoU of a class that is not in the data."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _examples(folder: Path, images: Sequence[Path]) -> list[str]:
    """Pictures of the images' middles with their prediction; returns their paths in the package."""
    if not images:
        return []
    from affmae_engine.data.readers import open_sources

    model = load(folder / package.WEIGHTS)
    if model.task != "finetune":
        raise ConfigError("examples show predictions; a pretrained network has none", "leave out --example")
    (folder / package.EXAMPLES).mkdir()
    names = []
    for number, image in enumerate(images, 1):
        with open_sources(image)[0] as source:
            depth, height, width = source.info.shape_ZYX
            top, left = max(0, height - EXAMPLE_EDGE) // 2, max(0, width - EXAMPLE_EDGE) // 2
            middle = slice(depth // 2, depth // 2 + 1)
            window = slice(top, top + EXAMPLE_EDGE), slice(left, left + EXAMPLE_EDGE)
            image_YX = source.read(middle, *window)[0]
            sizes = source.info.pixel_nm
        pixel_size = None if None in sizes[1:] else sizes
        picture = overlay(image_YX, np.asarray(model.predict(image_YX, pixel_size=pixel_size)), model.class_names)
        names.append(f"{package.EXAMPLES}/example-{number}.png")
        save_png(folder / names[-1], picture)
    return names


def _plain_name(model: Path) -> str:
    if package.is_on_hub(model):
        return package.hub_name(model)[0]
    name = model.resolve().name
    return name.removesuffix(".safetensors").removesuffix(".zip") or "model"


def _version() -> str:
    try:
        return version("affmae")
    except PackageNotFoundError:
        return ""
