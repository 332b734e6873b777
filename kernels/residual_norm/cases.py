"""Cases of the residual LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.residual_norm import residual_norm


def _case(
    name: str, shape: tuple[int, ...], *, offset: bool = True, scale: bool = False, network: bool = False
) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        normal = lambda *size: torch.randn(size, generator=random)  # noqa: E731
        arguments = {
            "x_BNC": (normal(*shape) + 0.3).to(dtype),
            "branch_BNC": normal(*shape).to(dtype),
            "weight_C": normal(shape[-1]),
            "bias_C": normal(shape[-1]),
        }
        return arguments | ({"offset_C": normal(shape[-1])} if offset else {})

    def call(*, backend: str, **arguments: Any) -> dict[str, Tensor]:
        x_BNC = arguments["x_BNC"]
        # One image in three loses its branch, the others are scaled up, as with stochastic depth.
        scale_B = 1.5 * (torch.arange(len(x_BNC), device=x_BNC.device) % 3 != 0) if scale else None
        y_BNC, sum_BNC = residual_norm(**arguments, scale_B=scale_B, backend=backend)
        return {"normalized": y_BNC, "sum": sum_BNC}

    return Case("residual_norm", name, make, call, network=network)


CASES = [
    _case("one row", (1, 1, 16), offset=False),
    _case("384 channels", (2, 5, 384)),
    _case("no middle axis", (37, 96), scale=True),
    _case("1030 channels", (3, 1030)),
    _case("stochastic depth", (3, 5, 48), scale=True),
    _case("base, stage 1", (32, 2048, 128), scale=True, network=True),
    _case("base, stage 3", (32, 327, 512), scale=True, network=True),
    _case("decoder", (32, 2048, 384), network=True),
]
