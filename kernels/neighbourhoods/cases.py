"""Cases of the neighbourhoods, and the positions that the cases of other operations use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.neighbourhoods import build_neighbourhoods

NETWORK_BATCH = 32
NETWORK_CANVAS = 64, 64
NETWORK_STAGES = ((2048, 128), (819, 256), (327, 512), (130, 768))
"""Tokens and channels of each stage of the base network at 512 px, half of the cells masked."""


def scattered(random: torch.Generator, batch: int, tokens: int, canvas_hw: tuple[int, int]) -> Tensor:
    """int32 [B, N, 2]: distinct random cells (x, y) in random order."""
    height, width = canvas_hw
    cells = [torch.randperm(height * width, generator=random)[:tokens] for _ in range(batch)]
    return _cell_positions(torch.stack(cells), width)


def network_positions(random: torch.Generator, tokens: int) -> Tensor:
    """int32 [B, N, 2]: cells of one stage of the network. They lie in patches, as under a Perlin mask."""
    height, width = NETWORK_CANVAS
    noise = torch.rand(NETWORK_BATCH, 1, 9, 9, generator=random)
    noise_BT = F.interpolate(noise, NETWORK_CANVAS, mode="bicubic").flatten(1)
    visible_BV = noise_BT.argsort(1)[:, : NETWORK_STAGES[0][0]]
    chosen_BV = torch.rand(visible_BV.shape, generator=random).argsort(1)[:, :tokens]
    return _cell_positions(visible_BV.gather(1, chosen_BV), width)


def _cell_positions(index_BN: Tensor, width: int) -> Tensor:
    return torch.stack([index_BN % width, index_BN // width], -1).int()


def with_neighbourhoods(canvas_hw: tuple[int, int], neighbours: int = 64) -> Callable[..., dict[str, Any]]:
    """A `Case.prepare` that replaces the argument "pos" by "near", the neighbourhoods of these positions."""

    def prepare(backend: str, pos: Tensor, **arguments: Any) -> dict[str, Any]:
        _, near = build_neighbourhoods(pos, canvas_hw, neighbours=neighbours, backend=backend)
        return {"near": near, **arguments}

    return prepare


def _case(
    name: str,
    make: Callable[[torch.Generator], Tensor],
    canvas_hw: tuple[int, int],
    cluster_size: int = 8,
    neighbours: int = 64,
    network: bool = False,
) -> Case:
    def call(backend: str, pos: Tensor) -> dict[str, Tensor]:
        order, near = build_neighbourhoods(
            pos, canvas_hw, cluster_size=cluster_size, neighbours=neighbours, backend=backend
        )
        return {"order": order, "positions": near.pos_BN2, "nearest clusters": near.nearest_BNC}

    return Case("neighbourhoods", name, lambda random, dtype: {"pos": make(random)}, call, network=network)


def _small(name: str, canvas_hw: tuple[int, int], tokens: int, cluster_size: int, neighbours: int) -> Case:
    return _case(name, lambda random: scattered(random, 2, tokens, canvas_hw), canvas_hw, cluster_size, neighbours)


def _network(tokens: int) -> Case:
    name = f"{NETWORK_BATCH} images, {tokens} tokens"
    return _case(name, lambda random: network_positions(random, tokens), NETWORK_CANVAS, network=True)


CASES = [
    _small("one token", (3, 3), 1, 8, 64),
    _small("one short cluster", (4, 4), 5, 8, 64),
    _small("two anchor cells", (2, 8), 16, 8, 16),
    _small("fewer tokens than neighbours", (6, 7), 37, 8, 64),
    _small("full canvas", (9, 9), 81, 8, 24),
    _small("flat canvas, short last cluster", (3, 41), 90, 8, 64),
    _small("tall canvas", (47, 5), 133, 8, 32),
    _small("clusters of 4", (12, 10), 71, 4, 16),
    _small("clusters of 5", (12, 10), 63, 5, 15),
    _small("sparse", (60, 60), 50, 8, 64),
    *(_network(tokens) for tokens, _ in NETWORK_STAGES),
]
