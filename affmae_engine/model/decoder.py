"""The decoder: queries on the canvas ask the tokens of each stage, coarsest first, and heads read them (method 4 to 6).

Notable: self- and cross-attention are both deformable point attention, post-norm; a sample is interpolated from the 4
tokens nearest to it. The queries do not move, so one table of nearest queries serves all four steps.

Axes: B batch, Q queries, N tokens of a stage, C decoder width, T canvas cells, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.encoder import STD, StageOutput, linear, weight_and_bias
from affmae_engine.model.sizes import size_of
from affmae_kernels.decoder_step import (
    AttentionWeights,
    Points,
    StepWeights,
    decoder_step,
    place_tokens,
    points,
)
from affmae_kernels.norm_linear import norm_linear
from affmae_kernels.precision import feature_dtype

SAMPLES = 4
"""Sampled locations of a query and head."""
HEADS = ("last", "step2", "step1")
"""Names of the heads. Without the auxiliary ones the sparse stages collapse."""
HEAD_OF_STEP = {0: "step1", 1: "step2", 3: "last"}
"""The head that reads a decoder step's output."""


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias, as deformable attention starts its projections."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def position_code(canvas_hw: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Sine code of every canvas cell, [T, dim] fp32: dim/2 channels for x, then dim/2 for y.

    With u = 2 * pi * x / max(w - 1, 1), channel i of a half has the frequency 10000^(-2 * floor(i / 2) / (dim / 2));
    the sines of the even channels come first, then the cosines of the odd ones. The canvas, not the batch, sets the
    scale.
    """
    half = dim // 2
    frequency_F = 10000.0 ** (-2 * (torch.arange(half, device=device) // 2) / half)
    codes_xy = []
    for cells in reversed(canvas_hw):
        angle_LF = torch.arange(cells, device=device)[:, None] * (2 * math.pi / max(cells - 1, 1)) * frequency_F
        codes_xy.append(torch.cat([angle_LF[:, 0::2].sin(), angle_LF[:, 1::2].cos()], -1))
    height, width = canvas_hw
    x_hwF, y_hwF = codes_xy[0].expand(height, -1, -1), codes_xy[1][:, None].expand(-1, width, -1)
    return torch.cat([x_hwF, y_hwF], -1).flatten(0, 1)


class PointAttention(nn.Module):
    """Parameters of a point attention; offsets start on rings around the query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.value = projection(dim, dim)
        self.offset = nn.Linear(dim, heads * SAMPLES * 2)
        self.logit = nn.Linear(dim, heads * SAMPLES)
        self.output = projection(dim, dim)
        self.tau = nn.Parameter(torch.tensor([2.0]))
        for layer in (self.offset, self.logit):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Sample s of head h starts s cells away, in the direction of the head, scaled to the unit square.
        angle_H = torch.arange(heads) * (2 * math.pi / heads)
        direction_H2 = torch.stack([angle_H.cos(), angle_H.sin()], -1)
        direction_H2 = direction_H2 / direction_H2.abs().amax(-1, keepdim=True)
        ring_S1 = torch.arange(1, SAMPLES + 1)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_((direction_H2[:, None] * ring_S1).flatten())

    def weights(self) -> AttentionWeights:
        """The parameters as `decoder_step` takes them."""
        return AttentionWeights(
            self.value.weight, self.value.bias, self.offset.weight, self.offset.bias, self.logit.weight,
            self.logit.bias, self.output.weight, self.output.bias, self.tau,
        )  # fmt: skip


class DecoderStep(nn.Module):
    """Self-attention among the queries, cross-attention to one stage, MLP; each x = LN(x + Drop(...))."""

    def __init__(self, dim: int, heads: int, hidden: int, source_dim: int, dropout: float, backend: str) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, backend
        self.source = linear(source_dim, dim)
        self.source_norm = nn.LayerNorm(dim)
        self.self_attention = PointAttention(dim, heads)
        self.cross_attention = PointAttention(dim, heads)
        self.ffn = nn.Sequential(projection(dim, hidden), nn.ReLU(), projection(hidden, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x_BQC: Tensor, queries: Points, stage_BNE: Tensor, tokens: Points, code_TC: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]; see `affmae_kernels.decoder_step`."""
        dropout = self.dropout if self.training else 0.0
        return decoder_step(
            x_BQC,
            queries,
            stage_BNE,
            tokens,
            code_TC,
            self.weights(),
            self.heads,
            dropout=dropout,
            backend=self.backend,
        )

    def weights(self) -> StepWeights:
        """The parameters as `decoder_step` takes them."""
        hidden, _, last = self.ffn
        return StepWeights(
            self.source.weight, self.source.bias, self.source_norm.weight, self.source_norm.bias,
            self.self_attention.weights(), self.norm1.weight, self.norm1.bias, self.cross_attention.weights(),
            self.norm2.weight, self.norm2.bias, *weight_and_bias(hidden), *weight_and_bias(last),
            self.norm3.weight, self.norm3.bias,
        )  # fmt: skip


class Decoder(nn.Module):
    """Mask tokens at the queries' positions, and one step per encoder stage from the coarsest to the finest."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        size = size_of(config)
        self.dim, self.backend = size.decoder_dim, backend
        hidden = round(self.dim * config.decoder_ffn_ratio)
        self.mask_token = nn.Parameter(torch.empty(self.dim))
        self.steps = nn.ModuleList(
            DecoderStep(self.dim, size.decoder_heads, hidden, dim, config.decoder_dropout, backend)
            for dim in reversed(size.dims)
        )
        nn.init.trunc_normal_(self.mask_token, std=STD)

    def forward(self, stages: list[StageOutput], query_pos_BQ2: Tensor, canvas_hw: tuple[int, int]) -> Iterator[Tensor]:
        """Yields the features of the queries, [B, Q, C], after each step.

        Heads that read a step are best called before the next one: in the backward pass their gradient is then made
        when it is needed, instead of lying in memory.

        Args:
            stages: the encoder's outputs, finest first.
            query_pos_BQ2: int32 (x, y) cells of the queries.
            canvas_hw: height and width of the canvas, in cells.
        """
        dtype = feature_dtype(stages[0].feat_BNC)
        queries = points(query_pos_BQ2, canvas_hw, backend=self.backend)
        # Every query starts as the mask token and the code of its place.
        code_TC = position_code(canvas_hw, self.dim, query_pos_BQ2.device).to(dtype)
        x_BQC = place_tokens(self.mask_token, code_TC, queries.cell_BN, backend=self.backend)
        for step, stage in zip(self.steps, reversed(stages), strict=True):
            tokens = points(stage.pos_BN2, canvas_hw, backend=self.backend)
            x_BQC = step(x_BQC, queries, stage.feat_BNC, tokens, code_TC)
            yield x_BQC


class Head(nn.Module):
    """LayerNorm and a linear layer to the values of a patch, laid out as (row, column, channel or class)."""

    def __init__(self, dim: int, values: int, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.norm = nn.LayerNorm(dim)
        self.linear = linear(dim, values)

    def forward(self, feat_BQC: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, values]."""
        norm, layer = self.norm, self.linear
        return norm_linear(feat_BQC, norm.weight, norm.bias, layer.weight, layer.bias, backend=self.backend)


def make_heads(dim: int, values: int, *, backend: str = "auto") -> nn.ModuleDict:
    """One head per supervised step, by name."""
    return nn.ModuleDict({name: Head(dim, values, backend=backend) for name in HEADS})
