"""A weights file: safetensors, with everything that prediction needs as JSON under the metadata key "affmae".

The file alone is enough to rebuild the network and its input: configuration, normalisation, pixel size, class names.
Reading one runs no code: the tensors are safetensors, the metadata is validated data.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import CorruptError, InputError, human_bytes, one_line

WEIGHTS_SCHEMA = 1
METADATA_KEY = "affmae"
_LARGEST_HEADER = 16 << 20  # thousands of tensors need one


class WeightsMetadata(BaseModel):
    """What a weights file says about itself. Unknown fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    schema_version: int = WEIGHTS_SCHEMA
    """Version of this record; a reader refuses one that is newer than it knows."""
    task: Task
    """What the weights were trained for: a masked autoencoder, or a segmenter."""
    step: int = 0
    """Optimizer steps taken; set by the trainer."""
    model: dict[str, Any]
    """The `[model]` section (`ModelConfig`)."""
    image_size: Annotated[int, Field(gt=0, le=1 << 16)]
    """Edge of a training image, in pixels."""
    normalisation: dict[str, Any]
    """`Normalisation.to_dict()` of the training data."""
    pixel_nm: float | None = None
    """Edge of a training pixel in nanometres, where the data says so."""
    class_names: Annotated[tuple[str, ...], Field(max_length=1 << 16)] = ()
    """Names of the label values 0, 1, 2, ...; empty for a masked autoencoder."""
    ignore_label: int | None = None
    """Label value that was neither trained on nor scored."""
    config: dict[str, dict[str, Any]] = {}
    """The whole resolved configuration of the run; set by the trainer."""

    @classmethod
    def of_run(cls, task: Task, config: RunConfig, **known: Any) -> WeightsMetadata:
        """The record of a run that is about to start; `known` are further fields, such as `normalisation`."""
        return cls(task=task, model=config.model.model_dump(mode="json"), image_size=config.image_size, **known)


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write a weights file; the caller makes it atomic. Tensors go to the host one by one, without a device copy."""
    write_tensors(path, tensors, {METADATA_KEY: metadata.model_dump_json()})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the caller makes it atomic. Its permissions follow the umask."""
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(permissions)  # safetensors makes files that their owner alone may read


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, after a look at the length that it gives its header (it is parsed as a whole)."""
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > _LARGEST_HEADER:
            raise CorruptError(
                f"{path} is damaged: its header would be {human_bytes(length)}", "restore it from a copy"
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path} is damaged: {one_line(error)}", "restore it from a copy") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CorruptError: the file is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


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
    with _opened(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
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
