"""Cases of the decoder step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case, scattered_positions
from affmae_kernels.decoder_step import AttentionWeights, StepWeights, decoder_step, place_tokens, points

SAMPLES = 4


def _attention_weights(random: torch.Generator, channels: int, heads: int) -> AttentionWeights:
    """Offsets lie on a grid of 1/32 cell and never halfway between two cells, whatever x is: their weights are 0, so
    that every precision looks a location up in the same cell."""

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(size, generator=random)

    samples = heads * SAMPLES
    offset_O = (normal(2 * samples, std=1.5) * 32).round() / 32 + 1 / 64
    return AttentionWeights(
        value_weight_CC=normal(channels, channels, std=channels**-0.5),
        value_bias_C=normal(channels, std=0.1),
        offset_weight_OC=torch.zeros(2 * samples, channels),
        offset_bias_O=offset_O,
        logit_weight_LC=normal(samples, channels, std=channels**-0.5),
        logit_bias_L=normal(samples),
        out_weight_CC=normal(channels, channels, std=channels**-0.5),
        out_bias_C=normal(channels, std=0.1),
        tau=torch.tensor([1.5]),
    )


def _case(
    name: str, batch: int, queries: int, tokens: int, canvas_hw: tuple[int, int], heads: int, width: int, source: int,
    ratio: int = 2, *, network: bool = False,
) -> Case:  # fmt: skip
    channels = heads * width

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*size: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(size, generator=random)

        def affine() -> tuple[Tensor, Tensor]:
            return 1 + normal(channels, std=0.1), normal(channels, std=0.1)

        weights = StepWeights(
            normal(channels, source, std=source**-0.5), normal(channels, std=0.1), *affine(),
            _attention_weights(random, channels, heads), *affine(), _attention_weights(random, channels, heads),
            *affine(), normal(ratio * channels, channels, std=channels**-0.5), normal(ratio * channels, std=0.1),
            normal(channels, ratio * channels, std=(ratio * channels) ** -0.5), normal(channels, std=0.1), *affine(),
        )  # fmt: skip
        return {
            "query_pos_BQ2": scattered_positions(random, batch, queries, canvas_hw),
            "pos_BN2": scattered_positions(random, batch, tokens, canvas_hw),
            "x_BQC": normal(batch, queries, channels).to(dtype),
            "feat_BNE": normal(batch, tokens, source).to(dtype),
            "weights": weights,
        }

    def prepare(*, backend: str, query_pos_BQ2: Tensor, pos_BN2: Tensor, **arguments: Any) -> dict[str, Any]:
        return arguments | {
            "queries": points(query_pos_BQ2, canvas_hw, backend=backend),
            "tokens": points(pos_BN2, canvas_hw, backend=backend),
        }

    def call(*, backend: str, x_BQC: Tensor, **arguments: Any) -> dict[str, Tensor]:
        cells = torch.arange(canvas_hw[0] * canvas_hw[1], device=x_BQC.device)
        code_TC = torch.sin(cells[:, None] * torch.arange(channels, device=x_BQC.device) * 0.37).to(x_BQC.dtype)
        return {"x": decoder_step(x_BQC, code_TC=code_TC, heads=heads, backend=backend, **arguments)}

    flops = 2 * batch * channels * (queries * (channels * (3 + 2 * ratio) + 144) + tokens * (source + channels))
    return Case("decoder_step", name, make, call, prepare, network=network, flops=flops)


def _place_case(name: str, batch: int, tokens: int, channels: int, cells: int, *, network: bool = False) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        cell_BN = torch.randint(cells, (batch, tokens), generator=random).int()
        like = torch.zeros(0, dtype=dtype)
        return {"token_C": torch.randn(channels, generator=random), "cell_BN": cell_BN, "like": like}

    def call(*, backend: str, token_C: Tensor, cell_BN: Tensor, like: Tensor) -> dict[str, Tensor]:
        code_TC = torch.arange(cells * channels, device=like.device).view(cells, channels).to(like.dtype).sin()
        return {"placed": place_tokens(token_C, code_TC, cell_BN, backend=backend)}

    return Case("decoder_step", name, make, call, network=network)


CASES = [
    _place_case("place, odd sizes", 2, 13, 24, 35),
    _place_case("place, base", 32, 2048, 384, 4096, network=True),
    _case("odd sizes", 1, 67, 61, (9, 8), 2, 16, 24),
    _case("three tokens", 2, 35, 3, (7, 6), 1, 32, 16),
    _case("two queries", 2, 2, 4, (3, 3), 2, 32, 64),
    _case("base, step 1", 32, 2048, 131, (64, 64), 6, 64, 768, network=True),
    _case("base, step 4", 32, 2048, 2048, (64, 64), 6, 64, 128, network=True),
]
