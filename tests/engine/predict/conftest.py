"""Small networks with known answers, for tests of tiled inference."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


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
