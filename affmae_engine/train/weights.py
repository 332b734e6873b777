"""A weights file: safetensors, with everything that prediction needs as JSON under the metadata key "affmae".

The file alone is enough to rebuild the network and its input: configuration, normalisation, pixel size, class names.
Reading one runs no code: the tensors are safetensors, the metadata is validated data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import CorruptError, InputError

WEIGHTS_SCHEMA = 1
METADATA_KEY = "affmae"


class WeightsMetadata(BaseModel):
    """What a weights file says about itself. Unknown fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    schema_version: int = WEIGHTS_SCHEMA
    """Version of this record; a reader refuses one that is newer than it knows."""
    task: Task
    """What the weights were trained for: a masked autoencoder, or a segmenter."""
    step: int = 0
    """Optimizer steps taken; set by the loop."""
    model: dict[str, Any]
    """The `[model]` section (`ModelConfig`)."""
    image_size: int
    """Edge of a training image, in pixels."""
    normalisation: dict[str, Any]
    """`Normalisation.to_dict()` of the training data."""
    pixel_nm: float | None = None
    """Edge of a training pixel in nanometres, where the data says so."""
    class_names: tuple[str, ...] = ()
    """Names of the label values 0, 1, 2, ...; empty for a masked autoencoder."""
    ignore_label: int | None = None
    """Label value that was neither trained on nor scored."""
    config: dict[str, Any] = {}
    """The whole resolved configuration of the run; set by the loop."""

    @classmethod
    def of_run(cls, task: Task, config: RunConfig, **known: Any) -> WeightsMetadata:
        """The record of a run that is about to start; `known` are further fields, such as `normalisation`."""
        return cls(task=task, model=config.model.model_dump(mode="json"), image_size=config.image_size, **known)


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write a weights file; the caller makes it atomic. Tensors go to the host one by one, without a device copy."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={METADATA_KEY: metadata.model_dump_json()},
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path} is damaged: {error}", "restore it from a copy") from error


def read_metadata(path: Path) -> WeightsMetadata:
    """The metadata of a weights file, without reading its tensors.

    Raises:
        InputError: there is no such file, it is not a weights file of ours, or it is of a newer version.
        CorruptError: the file is damaged.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is not an affmae weights file", "name a run directory, a checkpoint folder or a .safetensors file"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path} is damaged: {error}", "restore it from a copy") from error
    if text is None:
        raise InputError(f"{path} was not written by affmae: it has no affmae metadata")
    try:
        metadata = WeightsMetadata.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "metadata"
        raise CorruptError(f"{path}: {where}: {problem['msg']}", "was it written by another version?") from error
    if metadata.schema_version > WEIGHTS_SCHEMA:
        raise InputError(
            f"{path} has schema {metadata.schema_version}; this version reads up to {WEIGHTS_SCHEMA}", "update affmae"
        )
    return metadata
