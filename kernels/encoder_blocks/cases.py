"""Cases of the encoder blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case, scattered_positions
from affmae_kernels.encoder_blocks import BlockWeights, encoder_blocks
from affmae_kernels.neighbourhoods import build_neighbourhoods


def block_weights(random: torch.Generator, channels: int, heads: int, hidden: int) -> BlockWeights:
    """Random parameters of one block, of a size at which every gradient matters."""

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(size, generator=random)

    return BlockWeights(
        norm1_weight_C=1 + normal(channels, std=0.1),
        norm1_bias_C=normal(channels, std=0.1),
        qkv_weight_3CC=normal(3 * channels, channels, std=channels**-0.5),
        qkv_bias_3C=normal(3 * channels, std=0.5),
        position_weight_H5=normal(heads, 5, std=0.1),
        position_bias_H=normal(heads),
        blank_key_HD=normal(heads, channels // heads),
        blank_value_HD=normal(heads, channels // heads),
        out_weight_CC=normal(channels, channels, std=channels**-0.5),
        out_bias_C=normal(channels, std=0.1),
        norm2_weight_C=1 + normal(channels, std=0.1),
        norm2_bias_C=normal(channels, std=0.1),
        hidden_weight_FC=normal(hidden, channels, std=channels**-0.5),
        hidden_bias_F=normal(hidden, std=0.1),
        last_weight_CF=normal(channels, hidden, std=hidden**-0.5),
        last_bias_C=normal(channels, std=0.1),
    )


def _case(
    name: str, batch: int, tokens: int, canvas_hw: tuple[int, int], heads: int, width: int, ratio: int, *,
    blocks: int = 1, drop: bool = False, network: bool = False,
) -> Case:  # fmt: skip
    channels = heads * width

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "pos_BN2": scattered_positions(random, batch, tokens, canvas_hw),
            "feat_BNC": torch.randn(batch, tokens, channels, generator=random).to(dtype),
            "blocks": [block_weights(random, channels, heads, ratio * channels) for _ in range(blocks)],
            "norm_weight_C": 1 + 0.1 * torch.randn(channels, generator=random),
            "norm_bias_C": torch.randn(channels, generator=random),
        }

    def prepare(*, backend: str, pos_BN2: Tensor, **arguments: Any) -> dict[str, Any]:
        _, near = build_neighbourhoods(pos_BN2, canvas_hw, backend=backend)
        return arguments | {"near": near}

    def call(*, backend: str, feat_BNC: Tensor, **arguments: Any) -> dict[str, Tensor]:
        scale_SB = None
        if drop:  # some images lose the branch, the others have it scaled up
            index = torch.arange(2 * blocks * batch, device=feat_BNC.device).view(2 * blocks, batch)
            scale_SB = 1.25 * (index % 5 != 1)
        normed_BNC, last_BNC = encoder_blocks(feat_BNC, **arguments, branch_scale_SB=scale_SB, backend=backend)
        return {"normalized": normed_BNC, "features": last_BNC}

    flops = 2 * batch * tokens * blocks * channels * (4 * channels + 2 * ratio * channels + 2 * 65)
    return Case("encoder_blocks", name, make, call, prepare, network=network, flops=flops)


CASES = [
    _case("one block", 2, 37, (9, 7), 2, 32, 2),
    _case("two blocks with stochastic depth", 3, 21, (6, 5), 1, 16, 3, blocks=2, drop=True),
    _case("one token", 1, 1, (3, 3), 1, 32, 2),
    _case("base, stage 1", 32, 2048, (64, 64), 4, 32, 3, blocks=3, drop=True, network=True),
    _case("base, stage 3", 32, 327, (64, 64), 16, 32, 3, blocks=2, drop=True, network=True),
]
