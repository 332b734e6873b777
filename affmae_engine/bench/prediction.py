"""End to end: tiles per second of `affmae predict`, from the first tile read to the output's final name.

The input is a TIFF of noise, long enough for the rate to settle; outputs are deleted. Loading the model and recording
the pass are not included: the network alone has neither.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import nn

from affmae_engine.bench.networks import CLASSES, SpeedCase
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.readers import open_sources
from affmae_engine.predict.job import PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import predict
from affmae_engine.predict.tiling import tile_starts
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.weights import WeightsMetadata

SECONDS = 10.0
"""About how long one prediction takes, on a GPU."""
EDGES = {"cuda": 4, "cpu": 1}
"""Edge of a section, in tiles, by kind of device."""
MOST_SECTIONS = 80
KINDS = {"tiff": "a.tif", "zarr": "a.zarr"}
"""Outputs: the name of the figure and that of the output."""


def end_to_end(
    case: SpeedCase, model: nn.Module, choice: DeviceChoice, images_per_s: float, *, clahe: bool
) -> dict[str, float]:
    """Tiles per second to each of `KINDS`.

    Args:
        case: a case of prediction; its resolution is the tile, its batch the batch.
        model: its network on the device, in eval mode.
        images_per_s: tiles per second of the network alone, by which the length of the stack is chosen.
        clahe: whether tiles are equalized.
    """
    options = PredictOptions(tile=case.resolution, batch_size=case.batch, overwrite=True)
    edge = EDGES[choice.device.type] * case.resolution
    per_section = len(tile_starts(edge, case.resolution, options.overlap)) ** 2
    sections = 1
    if choice.device.type == "cuda":
        sections = max(2, min(MOST_SECTIONS, round(SECONDS * images_per_s / per_section)))
    with tempfile.TemporaryDirectory(prefix="affmae-bench-") as folder:
        stack, weights = Path(folder) / "stack.tif", Path(folder) / "weights"
        weights.touch()
        random = np.random.default_rng(0)
        tifffile.imwrite(
            stack,
            (random.integers(0, 255, (edge, edge), np.uint8) for _ in range(sections)),
            shape=(sections, edge, edge),
            dtype=np.uint8,
            photometric="minisblack",
        )
        about = WeightsMetadata(
            task="finetune", model=case.model.model_dump(mode="json"), image_size=case.resolution, normalisation={},
            class_names=tuple(f"class{k}" for k in range(CLASSES)),
        )  # fmt: skip
        normalisation = Normalisation("image", clahe=clahe)
        predictor = Predictor(weights, about, model, choice, normalisation, case.model.patch_size)
        predictor.network().probabilities(torch.zeros(case.batch, case.resolution, case.resolution).to(choice.device))
        found = {}
        for kind, name in KINDS.items():
            with open_sources(stack)[0] as source:
                report = predict(source, predictor, Outputs(Path(folder) / name, with_overlay=False), options)
            assert report is not None
            found[kind] = sections * per_section / report.seconds
        predictor.network().forget()
    return found
