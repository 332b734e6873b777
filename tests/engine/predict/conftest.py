"""Small networks with known answers, for tests of tiled inference."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor, nn

from affmae_engine.data.normalise import Normalisation
from affmae_engine.predict.predictor import Predictor
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.weights import WeightsMetadata


class ConstantModel(nn.Module):
    """The same logits at every pixel, whatever it sees."""

    def __init__(self, logits: tuple[float, ...] = (0.3, -1.0, 2.0)) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(logits))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        batch, _, height, width = image.shape
        return {"logits": self.value[None, :, None, None].expand(batch, -1, height, width).clone()}


class ConvModel(nn.Module):
    """A translation-equivariant network with a receptive field of 7 pixels."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 5, padding=2, padding_mode="zeros"), nn.GELU(), nn.Conv2d(8, classes, 3, padding=1)
        )
        for parameter in self.body.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(image)}


class ThresholdModel(nn.Module):
    """Class k where the pixel lies nearest to level k: prediction of a picture of levels is the picture."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": -20.0 * (image - self.levels[None, :, None, None]).square()}


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """The classes of the small networks."""
    return SimpleNamespace(constant=ConstantModel, conv=ConvModel, threshold=ThresholdModel)


LEVELS = (0, 100, 200)


@pytest.fixture
def make_predictor(tmp_path: Path) -> Callable[..., Predictor]:
    """Predictors around a toy network; the default one labels grey values by the nearest of `LEVELS`."""

    def make(model: nn.Module | None = None, **metadata: Any) -> Predictor:
        weights = tmp_path / "weights.safetensors"
        weights.touch()
        about = {
            "task": "finetune", "step": 7, "model": {}, "image_size": 32, "normalisation": {}, "pixel_nm": 4.0,
            "class_names": ("background", "membrane", "mitochondria"),
        } | metadata  # fmt: skip
        choice = DeviceChoice(torch.device("cpu"), torch.float32, "fp32", "CPU")
        network = model or ThresholdModel(tuple(level / 100 for level in LEVELS))
        identity = Normalisation("dataset", 0.0, 100.0)
        return Predictor(weights, WeightsMetadata(**about), network.eval(), choice, identity, 1)

    return make


@pytest.fixture
def write_stack(tmp_path: Path) -> Callable[..., Path]:
    """Write a stack of labels as grey levels to an ImageJ TIFF of 4 nm pixels; returns its path."""

    def write(labels: np.ndarray, name: str = "stack.tif", pixel_nm: float | None = 4.0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.asarray(LEVELS, np.uint8)[labels]
        scale = {} if pixel_nm is None else {"resolution": (1000 / pixel_nm, 1000 / pixel_nm)}
        unit = {} if pixel_nm is None else {"unit": "um", "spacing": 0.04}
        tifffile.imwrite(path, grey, imagej=True, metadata={"axes": "ZYX", **unit}, **scale)
        return path

    return write


@pytest.fixture
def blobs() -> np.ndarray:
    """Labels 0, 1, 2 in smooth regions: uint8 [3, 90, 70]."""
    rng = np.random.default_rng(5)
    coarse = rng.normal(size=(3, 10, 8)).repeat(9, 1).repeat(9, 2)[:, :90, :70]
    return np.digitize(coarse, (-0.4, 0.6)).astype(np.uint8)
