"""Cases of the pretraining loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.pixel_loss import pixel_loss


def _case(name: str, shape: tuple[int, int, int], *, padded: bool = False, network: bool = False) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {"pred_BQP": torch.randn(shape, generator=random).to(dtype)}
        target = {"pixels": torch.randint(-200, 200, shape, generator=random)}  # whole, so that they take no gradient
        real = {"real_BQP": torch.rand(shape, generator=random) < 0.7} if padded else {}
        return arguments | target | real

    def call(*, backend: str, pred_BQP: Tensor, pixels: Tensor, **real: Tensor) -> dict[str, Tensor]:
        return {"loss": pixel_loss(pred_BQP, pixels.to(pred_BQP.dtype) / 100, **real, backend=backend)}

    return Case("pixel_loss", name, make, call, network=network)


CASES = [
    _case("one pixel", (1, 1, 1)),
    _case("odd sizes", (2, 7, 13)),
    _case("padded image", (3, 5, 64), padded=True),
    _case("base", (32, 2048, 64), network=True),
]
