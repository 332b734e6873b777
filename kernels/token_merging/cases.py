"""Cases of token merging: scores, survivors, and what these gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.neighbourhoods.cases import (
    NETWORK_BATCH,
    NETWORK_CANVAS,
    NETWORK_STAGES,
    network_positions,
    scattered,
    with_neighbourhoods,
)
from affmae_kernels.token_merging import merge_tokens, select_survivors, token_scores

NETWORK_MERGES = tuple(
    (tokens, next_tokens, channels)
    for (tokens, channels), (next_tokens, _) in zip(NETWORK_STAGES, NETWORK_STAGES[1:], strict=False)
)
"""Tokens, survivors and channels."""


# --- merge_tokens


def _merge_inputs(
    random: torch.Generator, dtype: torch.dtype, pos: Tensor, channels: int, survivors: int
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    batch, tokens, _ = pos.shape
    return {
        "pos": pos,
        "survivors": normal(batch, tokens).argsort(1)[:, :survivors].sort(1).values,
        "feat": normal(batch, tokens, channels).to(dtype),
        "score": normal(batch, tokens).sigmoid(),
        "weight": 0.3 * normal(4, 5),
        "bias": 0.3 * normal(4),
        "norm_weight": 1 + 0.1 * normal(4),
        "norm_bias": 0.1 * normal(4),
    }


def _merge(
    backend: str, near: Any, survivors: Tensor, feat: Tensor, score: Tensor, **parameters: Tensor
) -> dict[str, Tensor]:
    return {"z": merge_tokens(feat, score, survivors, near, *parameters.values(), backend=backend)}


def _small_merge(
    name: str, canvas_hw: tuple[int, int], tokens: int, neighbours: int, batch: int, channels: int, survivors: int
) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return _merge_inputs(random, dtype, scattered(random, batch, tokens, canvas_hw), channels, survivors)

    return Case("token_merging", f"merge, {name}", make, _merge, with_neighbourhoods(canvas_hw, neighbours))


def _network_merge(tokens: int, survivors: int, channels: int) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return _merge_inputs(random, dtype, network_positions(random, tokens), channels, survivors)

    return Case(
        "token_merging",
        f"merge, {NETWORK_BATCH} images, {survivors} of {tokens} tokens, {channels} channels",
        make,
        _merge,
        with_neighbourhoods(NETWORK_CANVAS),
        network=True,
        flops=8 * NETWORK_BATCH * survivors * 64 * channels,
    )


# --- select_survivors


def _select_case(name: str, pos: Any, canvas_hw: tuple[int, int], count: int, levels: int = 0, **options: Any) -> Case:
    """`levels`: the values are one of so many numbers; 0: all differ."""

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        pos_BN2 = pos(random)
        value_BN = torch.randn(pos_BN2.shape[:2], generator=random)
        if levels:
            value_BN = torch.randint(levels, pos_BN2.shape[:2], generator=random) - levels / 2
        return {"pos": pos_BN2, "value": value_BN}

    def call(backend: str, near: Any, value: Tensor) -> dict[str, Tensor]:
        return {"survivors": select_survivors(value, near, count, backend=backend)}

    return Case("token_merging", f"survivors, {name}", make, call, with_neighbourhoods(canvas_hw), **options)


def _small_select(name: str, canvas_hw: tuple[int, int], tokens: int, count: int, levels: int) -> Case:
    return _select_case(name, lambda random: scattered(random, 2, tokens, canvas_hw), canvas_hw, count, levels)


def _network_select(tokens: int, count: int) -> Case:
    name = f"{NETWORK_BATCH} images, {count} of {tokens} tokens"
    return _select_case(name, lambda random: network_positions(random, tokens), NETWORK_CANVAS, count, network=True)


# --- token_scores


def _scores_case(batch: int, tokens: int, channels: int, *, network: bool = False) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "feat": torch.randn(batch, tokens, channels, generator=random).to(dtype),
            "weight": torch.randn(1, channels, generator=random) / channels**0.5,
            "bias": torch.randn(1, generator=random),
        }

    def call(backend: str, feat: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"score": token_scores(feat, weight, bias, backend=backend)}

    name = f"scores, {batch} images, {tokens} tokens, {channels} channels"
    return Case("token_merging", name, make, call, network=network)


CASES = [
    _small_merge("one short cluster", (4, 4), 5, 64, 2, 16, 2),
    _small_merge("one survivor", (7, 6), 37, 64, 2, 32, 1),
    _small_merge("flat canvas, short last cluster", (5, 23), 83, 16, 1, 96, 33),
    _small_merge("all survive", (6, 7), 29, 24, 2, 48, 29),
    _small_merge("several groups", (12, 9), 97, 64, 1, 32, 38),
    _small_select("one of one", (3, 3), 1, 1, 0),
    _small_select("different values", (9, 11), 61, 24, 0),
    _small_select("all equal", (9, 11), 61, 24, 1),
    _small_select("many equal", (12, 9), 97, 38, 4),
    _small_select("all survive", (6, 7), 29, 29, 3),
    _scores_case(2, 5, 16),
    _scores_case(1, 83, 96),
    _scores_case(3, 37, 200),
    *(_network_merge(*sizes) for sizes in NETWORK_MERGES),
    *(_network_select(tokens, survivors) for tokens, survivors, _ in NETWORK_MERGES),
    *(_scores_case(NETWORK_BATCH, tokens, channels, network=True) for tokens, _, channels in NETWORK_MERGES),
]
