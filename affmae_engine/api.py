"""Trained models in Python: `import affmae_engine as affmae`, then `affmae.load("runs/seg").predict(array)`.

`load` takes whatever the command line takes as a model. Arrays are numpy, dask, zarr or anything else that slices into
numpy arrays; only the rows in work are in memory. `affmae_engine.training_api` has `pretrain` and `finetune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from affmae_engine.array_prediction import TileSettings, band_probabilities
from affmae_engine.arrays import ArraySource, voxel_size
from affmae_engine.checkpoint import weights_file
from affmae_engine.config import LossConfig, ModelConfig, TrainConfig
from affmae_engine.data.normalise import IntensityMap, Normalisation
from affmae_engine.data.statistics import measure
from affmae_engine.embedding import Embedding, embed
from affmae_engine.errors import ConfigError, CorruptError, InputError
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.model.build import build_autoencoder
from affmae_engine.predict.predictor import Predictor
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.weights import WeightsMetadata, read_metadata, read_tensors

Device = Literal["auto", "cpu", "cuda"]
PixelSizeNm = float | Sequence[float | None] | None


def load(
    model: str | Path,
    *,
    which: Literal["best", "last"] = "best",
    device: Device = "auto",
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> Model:
    """A trained model, ready to use.

    Args:
        model: a run directory, a checkpoint folder, a .safetensors file, a model package (a folder or ZIP file made by
            `affmae share`), or `hf:ORG/NAME` on the Hugging Face Hub.
        which: of a run directory, the checkpoint with the best held-out score, or the newest.
        device: `auto` takes a CUDA GPU if there is one.
        backend: of the operations (`kernels.backend`).

    Raises:
        InputError: nothing of that kind there.
        CorruptError: it is damaged.
        ResourceError: no CUDA where it was asked for.
        ConfigError: `huggingface_hub` is needed and not installed.
    """
    file = weights_file(Path(model).expanduser(), which=which)
    metadata = read_metadata(file)
    if metadata.task == "finetune":
        predictor = Predictor.from_weights(file, device=device, backend=backend)
        return Model(file, metadata, predictor.model, predictor.normalisation, predictor)
    return _autoencoder(file, metadata, device, backend)


@dataclass(frozen=True)
class Model:
    """A trained network. weights: the file it came from. metadata: what that file says. network: in eval mode on its
    device. predictor: None for a pretrained network, which knows no classes."""

    weights: Path
    metadata: WeightsMetadata
    network: nn.Module
    normalisation: Normalisation
    predictor: Predictor | None = None

    @property
    def task(self) -> Literal["pretrain", "finetune"]:
        """What the network was trained for."""
        return self.metadata.task

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label values 0, 1, 2, ...; empty for a pretrained network."""
        return self.metadata.class_names

    @property
    def pixel_nm(self) -> float | None:
        """Edge of a training pixel in nanometers, where it is known."""
        return self.metadata.pixel_nm

    def predict(
        self,
        array: Any,
        *,
        pixel_size: PixelSizeNm = None,
        rescale: bool = True,
        out: Any = None,
        tile: int | None = None,
        overlap: float | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Labels of a section or stack of any size.

        Args:
            array: gray [Y, X] or [Z, Y, X] with real numbers, in the intensities of the files that were trained on.
            pixel_size: (z, y, x), (y, x) or one number, in nanometers.
            rescale: where both pixel sizes are known, compute at the training's; labels keep the array's own grid.
            out: array with the same shape to write into, for results that do not fit in memory (a zarr array).
            tile: edge of a tile in pixels. overlap: share of a tile that its neighbor covers too.
            batch_size: tiles per forward pass. The defaults of all three are the model's own.

        Returns:
            `out`, or a numpy array of the array's shape; the values index `class_names`.

        Raises:
            ConfigError: the model was pretrained and knows no classes.
            InputError: the array is no section or stack of real numbers.
            ResourceError: not even one tile fits in memory.
        """
        predictor = self._predictor()
        source = ArraySource(array, voxel_size(pixel_size))
        shape = tuple(np.shape(array))
        dtype = np.min_scalar_type(predictor.classes - 1)
        result = np.empty(shape, dtype) if out is None else out
        if tuple(result.shape) != shape:
            raise InputError(f"out has shape {tuple(result.shape)}; the array has {shape}", "make them equal")
        settings = TileSettings.of(predictor, tile=tile, overlap=overlap, batch_size=batch_size)
        for z, first_row, values_CRX in band_probabilities(predictor, source, settings, rescale=rescale):
            labels_RX = values_CRX.argmax(dim=0).cpu().numpy().astype(dtype)
            rows = slice(first_row, first_row + len(labels_RX))
            if len(shape) == 2:
                result[rows] = labels_RX
            else:
                result[z, rows] = labels_RX
        return result

    def probabilities(
        self,
        array: Any,
        *,
        pixel_size: PixelSizeNm = None,
        rescale: bool = True,
        tile: int | None = None,
        overlap: float | None = None,
        batch_size: int | None = None,
    ) -> NDArray[np.float32]:
        """Class probabilities, float32 [C, Z, Y, X] (of a section [C, Y, X]); arguments and errors as for `predict`."""
        predictor = self._predictor()
        source = ArraySource(array, voxel_size(pixel_size))
        result_CZYX = np.empty((predictor.classes, *source.info.shape_ZYX), np.float32)
        settings = TileSettings.of(predictor, tile=tile, overlap=overlap, batch_size=batch_size)
        for z, first_row, values_CRX in band_probabilities(predictor, source, settings, rescale=rescale):
            result_CZYX[:, z, first_row : first_row + values_CRX.shape[1]] = values_CRX.cpu().numpy()
        return result_CZYX[:, 0] if np.ndim(array) == 2 else result_CZYX

    def embed(self, array: Any, *, stages: Sequence[int] = (1, 2, 3, 4)) -> Embedding:
        """Features of a section or stack: tokens with positions, and a dense map; see `embedding.Embedding`.

        Args:
            array: as for `predict`.
            stages: the encoder stages (1 to 4) that the map holds.

        Raises:
            ConfigError: a ViT, which merges no tokens; or other stages.
            InputError: the array is no section or stack of real numbers.
        """
        if not isinstance(self.network, MaskedAutoencoder | Segmenter):
            raise ConfigError("embed needs an AFFMAE network; this is a ViT", "load a model of the family affmae")
        if not stages or not set(stages) <= {1, 2, 3, 4}:
            raise ConfigError(f"stages {tuple(stages)} are not all between 1 and 4", "choose some of 1, 2, 3, 4")
        source = ArraySource(array)
        patch = self.network.patch
        found = embed(
            source, self.network.encoder, self._intensities(source),
            tile=-(-self.metadata.image_size // patch) * patch, device=self._choice.device, stages=stages,
            autocast=None if self._choice.precision == "fp32" else self._choice.dtype,
        )  # fmt: skip
        return Embedding(found.stages, found.map[0], patch) if np.ndim(array) == 2 else found

    def _predictor(self) -> Predictor:
        if self.predictor is None:
            raise ConfigError(
                f"{self.weights} was pretrained and knows no classes yet",
                "finetune it: affmae.finetune(images=..., labels=..., init_from=...)",
            )
        return self.predictor

    def _intensities(self, source: ArraySource) -> IntensityMap:
        return self.normalisation.for_image(measure(source))

    @cached_property
    def _choice(self) -> DeviceChoice:
        if self.predictor is not None:
            return self.predictor.choice
        return pick_device(TrainConfig(device="cuda" if next(self.network.parameters()).is_cuda else "cpu"))


def _autoencoder(file: Path, metadata: WeightsMetadata, device: Device, backend: str) -> Model:
    try:
        network = build_autoencoder(ModelConfig.model_validate(metadata.model), LossConfig(), backend=backend)
        network.load_state_dict(read_tensors(file))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise CorruptError(f"{file}: the model's description is not valid: {problem}", "was it edited?") from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CorruptError(f"{file} does not fit its own description: {reason}", "was it edited?") from error
    exact_fp32()
    network.requires_grad_(False).eval().to(pick_device(TrainConfig(device=device)).device)
    return Model(file, metadata, network, Normalisation.from_dict(metadata.normalisation))
