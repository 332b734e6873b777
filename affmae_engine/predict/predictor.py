"""A finetuned network ready to predict: rebuilt from a weights file alone, on a device, in the right precision."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from torch import nn

from affmae_engine.checkpoint import WEIGHTS, weights_file
from affmae_engine.config import ModelConfig, TrainConfig
from affmae_engine.data.normalise import Normalisation
from affmae_engine.errors import CorruptError, InputError
from affmae_engine.model.build import build_segmenter
from affmae_engine.predict.network import TileNetwork
from affmae_engine.run_dir import RunDir, list_runs
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.weights import WeightsMetadata, read_metadata, read_tensors

Which = Literal["best", "last"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Predictor:
    """A segmenter in eval mode on its device.

    weights: the file it came from. patch: pixels that a tile must be a multiple of.
    """

    weights: Path
    metadata: WeightsMetadata
    model: nn.Module
    choice: DeviceChoice
    normalisation: Normalisation
    patch: int

    @classmethod
    def from_weights(
        cls, path: Path, *, which: Which = "best", device: Device = "auto", backend: str = "auto"
    ) -> Predictor:
        """Rebuild a finetuned network.

        Args:
            path: a run directory, a checkpoint folder or a .safetensors file.
            which: of a run directory, the best or the newest checkpoint.
            device: `auto` takes a CUDA card if there is one. On a card the autocast is the one of training (bf16
                where the card has it), on a CPU it is off.
            backend: of the operations (`kernels.backend`).

        Raises:
            InputError: nothing there, not a weights file of ours, or weights of a pretraining run.
            CorruptError: damaged, or weights that do not fit their own description.
            ResourceError: no CUDA where it was asked for.
        """
        file = weights_file(path, which=which)
        metadata = read_metadata(file)
        if metadata.task != "finetune" or not metadata.class_names:
            raise InputError(
                f"{path} was pretrained and knows no classes yet",
                f"finetune it first: affmae finetune --images I --labels L --init-from {path}",
            )
        try:
            config = ModelConfig.model_validate(metadata.model)
            if config.channels != 1:
                raise InputError(f"{path} was trained on {config.channels} channels; prediction reads grey images")
            model = build_segmenter(config, len(metadata.class_names), backend=backend)
            model.load_state_dict(read_tensors(file))
        except ValidationError as error:
            raise CorruptError(
                f"{file}: the model's description is not valid: {error.errors()[0]['msg']}", "was it edited?"
            ) from error
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CorruptError(f"{file} does not fit its own description: {reason}", "was it edited?") from error
        choice = _device(metadata, device)
        exact_fp32()
        model.requires_grad_(False).eval().to(choice.device)
        normalisation = Normalisation.from_dict(metadata.normalisation)
        return cls(file, metadata, model, choice, normalisation, config.patch_size)

    @property
    def classes(self) -> int:
        """Number of classes, the values 0..classes-1 of the labels."""
        return len(self.metadata.class_names)

    @property
    def excluded(self) -> tuple[int, ...]:
        """Values that are never predicted: the ignored label, where it is one of the class values."""
        ignored = self.metadata.ignore_label
        return (ignored,) if ignored is not None and ignored < self.classes else ()

    @cached_property
    def weights_sha256(self) -> str:
        """Of the weights file, as hexadecimal digits."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def tile(self, asked: int | None, shape_ZYX: tuple[int, int, int]) -> int:
        """Edge of a tile in whole patches: `asked`, or the training image's.

        What is larger than both the planes and the training image is clamped: it would see nothing but reflections.
        """
        wanted, trained, image = (
            -(-pixels // self.patch) * self.patch
            for pixels in (asked or self.metadata.image_size, self.metadata.image_size, max(shape_ZYX[1:]))
        )
        return min(wanted, max(trained, image))

    def network(self, *, tta: bool = False) -> TileNetwork:
        """The model as a function of tiles; the same one in every call."""
        if tta not in self._networks:
            self._networks[tta] = TileNetwork(
                self.model,
                classes=self.classes,
                device=self.choice.device,
                autocast=self.choice.dtype if self.choice.precision != "fp32" else None,
                excluded=self.excluded,
                tta=tta,
                record=True,
            )
        return self._networks[tta]

    @cached_property
    def _networks(self) -> dict[bool, TileNetwork]:
        return {}

    def describe(self) -> dict[str, object]:
        """What made an output, as plain JSON values."""
        return {
            "weights": str(self.weights),
            "step": self.metadata.step,
            "dtype": str(label_dtype(self.classes)),
            "training_pixel_nm": self.metadata.pixel_nm,
        }


def label_dtype(classes: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds the labels 0..classes-1."""
    return np.min_scalar_type(max(0, classes - 1))


def newest_finetune_run(folder: Path = Path("runs")) -> Path:
    """The newest finished finetune run directly under `folder`.

    Raises:
        InputError: there is none; the hint says what there is instead.
    """
    unfinished: list[str] = []
    for run in reversed(list_runs(folder)):
        if _task(run) != "finetune":
            continue
        if run.read_json(run.summary).get("status") == "finished":
            return run.root
        unfinished.append(run.root.name)
    if unfinished:
        hint = f"unfinished there: {', '.join(unfinished[:3])}; name one with -m to use its checkpoints so far"
    else:
        hint = "name a run with -m, or make one: affmae finetune --images I --labels L"
    raise InputError(f"no finished finetune run in {folder}", hint)


def _task(run: RunDir) -> str | None:
    """What a run was for, by its newest readable checkpoint (not verified: that costs reading all of it)."""
    for step in run.checkpoint_steps():
        with contextlib.suppress(InputError, CorruptError):
            return read_metadata(run.checkpoint(step) / WEIGHTS).task
    return None


def _device(metadata: WeightsMetadata, device: Device) -> DeviceChoice:
    chosen = pick_device(TrainConfig(device=device))
    trained = metadata.config.get("train", {}).get("precision")
    if chosen.device.type == "cuda" and trained == "fp32":
        return pick_device(TrainConfig(device=device, precision="fp32"))
    return chosen
