"""Cases of cluster attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.neighbourhoods.cases import (
    NETWORK_BATCH,
    NETWORK_CANVAS,
    NETWORK_STAGES,
    network_positions,
    scattered,
    with_neighbourhoods,
)

WIDTH = 32
"""Of the network's heads."""


def _inputs(random: torch.Generator, dtype: torch.dtype, pos: Tensor, heads: int, width: int) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return {
        "pos": pos,
        "qkv": normal(*pos.shape[:2], 3, heads, width).to(dtype),
        "blank_key": normal(heads, width),
        "blank_value": normal(heads, width),
        "bias_weight": 0.1 * normal(heads, 5),
        "bias": 0.1 * normal(heads),
    }


def _call(backend: str, near: Any, qkv: Tensor, **parameters: Tensor) -> dict[str, Tensor]:
    return {"out": cluster_attention(qkv, near, *parameters.values(), backend=backend)}


def _small(
    name: str, canvas_hw: tuple[int, int], tokens: int, neighbours: int, batch: int, heads: int, width: int
) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return _inputs(random, dtype, scattered(random, batch, tokens, canvas_hw), heads, width)

    return Case("cluster_attention", name, make, _call, with_neighbourhoods(canvas_hw, neighbours))


def _network(tokens: int, channels: int) -> Case:
    heads = channels // WIDTH

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return _inputs(random, dtype, network_positions(random, tokens), heads, WIDTH)

    return Case(
        "cluster_attention",
        f"{NETWORK_BATCH} images, {tokens} tokens, {heads} heads of {WIDTH}",
        make,
        _call,
        with_neighbourhoods(NETWORK_CANVAS),
        network=True,
        flops=4 * NETWORK_BATCH * tokens * (64 + 1) * channels,
    )


CASES = [
    _small("one token", (3, 3), 1, 64, 1, 1, 16),
    _small("one short cluster", (4, 4), 5, 64, 2, 2, 32),
    _small("fewer tokens than neighbours", (7, 6), 37, 64, 2, 2, 32),
    _small("flat canvas, short last cluster", (5, 23), 83, 16, 1, 3, 32),
    _small("heads of 64", (9, 8), 50, 24, 2, 2, 64),
    _small("heads of 16, odd number", (8, 9), 49, 32, 1, 3, 16),
    _small("several groups", (12, 9), 97, 64, 1, 2, 32),
    *(_network(tokens, channels) for tokens, channels in NETWORK_STAGES),
]
