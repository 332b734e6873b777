"""Cases of LayerNorm and a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.norm_linear import norm_linear


def _case(name: str, shape: tuple[int, ...], features: int, *, network: bool = False) -> Case:
    channels = shape[-1]

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x_BNC": torch.randn(shape, generator=random).to(dtype),
            "norm_weight_C": 1 + 0.1 * torch.randn(channels, generator=random),
            "norm_bias_C": torch.randn(channels, generator=random),
            "weight_FC": channels**-0.5 * torch.randn(features, channels, generator=random),
            "bias_F": torch.randn(features, generator=random),
        }

    def call(*, backend: str, **arguments: Tensor) -> dict[str, Tensor]:
        return {"out": norm_linear(**arguments, backend=backend)}

    flops = 2 * torch.Size(shape).numel() * features
    return Case("norm_linear", name, make, call, network=network, flops=flops)


CASES = [
    _case("one row", (1, 1, 24), 5),
    _case("odd sizes", (2, 7, 40), 72),
    _case("more channels than features", (3, 5, 260), 64),
    _case("base, pixel head", (32, 2048, 384), 64, network=True),
    _case("base, reduction after stage 3", (32, 131, 2048), 768, network=True),
]
