"""Small models and batches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from affmae_engine.config import LossConfig, MaskConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.patches import canvas_of

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """batch(images, height, width, channels=1, patch=8, ratio=0.5): random image, visible and masked tokens."""

    def make(
        images: int, height: int, width: int, *, channels: int = 1, patch: int = 8, ratio: float = 0.5, seed: int = 0
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(images, channels, height, width, generator=generator)
        canvas = canvas_of(height, width, patch)
        masks = [draw_mask(canvas, MaskConfig(ratio=ratio), seed=seed, index=i) for i in range(images)]
        return image, torch.stack([m[0] for m in masks]), torch.stack([m[1] for m in masks])

    return make


@pytest.fixture
def autoencoder() -> Callable[..., MaskedAutoencoder]:
    """autoencoder(**model settings): a seeded tiny model in eval mode, every parameter away from its start."""

    def make(**settings: object) -> MaskedAutoencoder:
        torch.manual_seed(0)
        model = MaskedAutoencoder(ModelConfig(size="tiny", **settings), LossConfig())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        return model.eval()

    return make
