"""A model package as a BioImage.IO model (bioimage.io, specification 0.5), for Fiji, ilastik, QuPath and others.

The weights are TorchScript of the reference implementation for one tile size; the description (rdf.yaml) states input,
normalization and classes, and has a test input with the output that the network gives for it. YAML contains JSON, so
rdf.yaml is written as JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affmae_engine.errors import AffmaeError, ConfigError, first_line
from affmae_engine.export import Exported, sample_tile
from affmae_engine.model_package import CARD
from affmae_engine.share import PAPER, PAPER_URL, Description
from affmae_engine.weights import WeightsMetadata

FORMAT = "0.5.4"
RDF = "rdf.yaml"
TORCHSCRIPT = "model.pt"
TEST_INPUT, TEST_OUTPUT = "test_input.npy", "test_output.npy"
EPSILON = 1e-6
"""Added to a standard deviation by BioImage.IO's own normalization of each image."""
_LINK = re.compile(r"https?://\S+")
_DOI = re.compile(r"10\.\d{4,}/\S+")


def add_bioimageio(
    folder: Path, name: str, metadata: WeightsMetadata, exported: Exported, description: Description
) -> dict[str, float]:
    """Write what makes a package's folder a BioImage.IO model too; returns how far TorchScript differs, by file.

    Raises:
        ConfigError: the normalization (CLAHE) cannot be described there.
        AffmaeError: TorchScript does not compute what the network computes.
    """
    record = metadata.normalisation
    if record.get("clahe"):
        raise ConfigError(
            "BioImage.IO cannot describe CLAHE, which this model's images go through", "share it without --bioimageio"
        )
    difference = exported.save_torchscript(folder / TORCHSCRIPT)
    fixed = record.get("mode") == "dataset"
    mean, std = (record["mean"], record["std"]) if fixed else (128.0, 40.0)
    raw_11TT = (sample_tile(exported.tile, 3).numpy() * std + mean).astype(np.float32)
    centered = raw_11TT - (mean if fixed else raw_11TT.mean())
    normalized = centered / (std if fixed else raw_11TT.std() + EPSILON)
    with torch.no_grad():
        output = exported.network(torch.from_numpy(normalized.astype(np.float32))).numpy()
    np.save(folder / TEST_INPUT, raw_11TT)
    np.save(folder / TEST_OUTPUT, output)
    (folder / RDF).write_text(
        json.dumps(_description(folder, name, metadata, exported, description), indent=2), "utf-8"
    )
    return {TORCHSCRIPT: difference}


def validate(package: Path) -> str:
    """Test a BioImage.IO package with bioimageio.core, which runs it on its test input; a line that says how it went.

    Raises:
        AffmaeError: the package is not valid, or its output is another one.
    """
    try:
        from bioimageio.core import test_model
    except ImportError:
        return 'not validated: bioimageio.core is not installed (pip install "affmae[bioimageio]")'
    except Exception as error:  # its own dependencies may not fit this environment
        return f"not validated: bioimageio.core cannot be used here ({first_line(error)})"
    summary = test_model(package)
    if summary.status == "failed":
        problems = [str(each.msg) for detail in summary.details for each in detail.errors]
        if any("Error calling function" in problem for problem in problems):  # a serializer of its own failed
            return 'not validated: bioimageio.core does not work with this pydantic (pip install "affmae[bioimageio]")'
        raise AffmaeError(f"{package} is not a valid BioImage.IO model: {'; '.join(problems) or summary.status}")
    return f"valid ({summary.status}, bioimageio.core)"


def _description(
    folder: Path, name: str, metadata: WeightsMetadata, exported: Exported, description: Description
) -> dict[str, Any]:
    scale = {"scale": metadata.pixel_nm, "unit": "nanometer"} if metadata.pixel_nm else {}
    space = [{"type": "space", "id": axis, "size": exported.tile, **scale} for axis in ("y", "x")]
    if metadata.normalisation.get("mode") == "dataset":
        kwargs: dict[str, Any] = {key: metadata.normalisation[key] for key in ("mean", "std")}
        preprocessing = {"id": "fixed_zero_mean_unit_variance", "kwargs": kwargs}
    else:
        preprocessing = {
            "id": "zero_mean_unit_variance", "kwargs": {"axes": ["channel", "y", "x"], "eps": EPSILON},
        }  # fmt: skip
    batch = {"type": "batch", "size": 1}
    cite = [{"text": PAPER, "url": PAPER_URL}]
    if description.cite and (found := _DOI.search(description.cite)):
        cite.insert(0, {"text": description.cite, "doi": found[0].rstrip(".,;)")})
    elif description.cite and (found := _LINK.search(description.cite)):
        cite.insert(0, {"text": description.cite, "url": found[0].rstrip(".,;)")})
    return {
        "format_version": FORMAT,
        "type": "model",
        "name": _title(name),
        "description": f"Segmentation of electron microscopy: {', '.join(metadata.class_names)}"[:1000],
        "authors": [{"name": author} for author in description.authors or ("unknown",)],
        "cite": cite,
        **({"license": description.license} if description.license else {}),
        "documentation": CARD,
        "tags": ["electron-microscopy", "semantic-segmentation", "affmae", "2d"],
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": [
            {
                "id": "image",
                "axes": [batch, {"type": "channel", "channel_names": ["intensity"]}, *space],
                "test_tensor": _file(folder, TEST_INPUT),
                "data": {"type": "float32"},
                "preprocessing": [preprocessing],
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "axes": [batch, {"type": "channel", "channel_names": _identifiers(metadata.class_names)}, *space],
                "test_tensor": _file(folder, TEST_OUTPUT),
                "data": {"type": "float32", "range": [0, 1]},
            }
        ],
        "weights": {
            "torchscript": {**_file(folder, TORCHSCRIPT), "pytorch_version": torch.__version__.partition("+")[0]}
        },
    }


def _file(folder: Path, name: str) -> dict[str, str]:
    with (folder / name).open("rb") as handle:
        return {"source": name, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _identifiers(names: tuple[str, ...]) -> list[str]:
    """Class names as the specification has them: letters, digits and underscores, not starting with a digit."""
    plain = [re.sub(r"\W", "_", name, flags=re.ASCII) or "_" for name in names]
    return [f"class_{name}" if name[0].isdigit() else name for name in plain]


def _title(name: str) -> str:
    """A model's name as the specification has it: 5 to 128 letters, digits, spaces and a few signs."""
    plain = re.sub(r"[^\w ()+-]", "-", name)[:128]
    return plain if len(plain) >= 5 else f"affmae-{plain}"
