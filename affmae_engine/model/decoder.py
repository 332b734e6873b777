"""The decoder: queries on the canvas ask the points of each stage, coarsest first (method section 4).

Unusual: both self- and cross-attention are deformable point attention; a sample is interpolated from the 4 tokens
nearest to it. Post-norm. The set of queries never changes, so its table of nearest points serves all four steps.

Axes: B batch, Q queries, N tokens of a stage, C decoder width, H hidden width, A heads, D head width, S samples (in
suffixes 2S, 3S: those of all heads), T canvas cells.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.encoder import StageOutput
from affmae_engine.model.initialise import STD, linear, projection
from affmae_engine.model.norm import LayerNorm
from affmae_engine.model.sizes import SIZES
from affmae_kernels.linear_relu import linear_relu
from affmae_kernels.point_attention import nearest_table, point_attention
from affmae_kernels.residual_norm import residual_norm

SAMPLES = 4


class SineEmbedding(nn.Module):
    """Position code: C/2 channels for x, then C/2 for y, of u = 2 * pi * x / max(w - 1, 1).

    Channel i of a half has the frequency 10000^(-2 * floor(i / 2) / (C / 2)); the sines of the even channels come
    first, then the cosines of the odd ones, as sines a quarter turn ahead. The canvas, not the batch, sets the scale.
    """

    frequency_C: Tensor
    phase_C: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequency_H = 10000.0 ** (-2 * (torch.arange(half) // 2) / half)
        frequency_H = torch.cat([frequency_H[0::2], frequency_H[1::2]])
        phase_H = (torch.arange(half) >= (half + 1) // 2) * (math.pi / 2)
        self.register_buffer("frequency_C", torch.cat([frequency_H, frequency_H]), persistent=False)
        self.register_buffer("phase_C", torch.cat([phase_H, phase_H]), persistent=False)

    def forward(self, pos_BN2: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
        """int32 (x, y) cells [B, N, 2] -> [B, N, C], of autocast's dtype where that is on, else fp32."""
        of_x_C = torch.arange(len(self.phase_C), device=pos_BN2.device) < len(self.phase_C) // 2
        x_BN1, y_BN1 = (
            pos_BN2[..., axis, None] * (2 * math.pi / max(cells - 1, 1)) for axis, cells in enumerate(canvas_hw[::-1])
        )
        sine_BNC = (torch.where(of_x_C, x_BN1, y_BN1) * self.frequency_C + self.phase_C).sin()
        kind = pos_BN2.device.type
        return sine_BNC.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else sine_BNC


class Points:
    """A set of tokens that can be asked: positions on a canvas and the table of the nearest ones."""

    def __init__(self, pos_BN2: Tensor, canvas_hw: tuple[int, int], backend: str) -> None:
        self.pos_BN2, self.canvas_hw = pos_BN2, canvas_hw
        self.table = nearest_table(pos_BN2, canvas_hw, backend=backend)


class PointAttention(nn.Module):
    """Projections around `affmae_kernels.point_attention`; offsets start on rings around the query."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.value = projection(dim, dim)
        self.offset = nn.Linear(dim, heads * SAMPLES * 2)
        self.logit = nn.Linear(dim, heads * SAMPLES)
        self.output = projection(dim, dim)
        self.tau = nn.Parameter(torch.tensor([2.0]))
        for layer in (self.offset, self.logit):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle_A = torch.arange(heads) * (2 * math.pi / heads)
        direction_A2 = torch.stack([angle_A.cos(), angle_A.sin()], -1)
        direction_A2 = direction_A2 / direction_A2.abs().amax(-1, keepdim=True)
        ring_S11 = torch.arange(1, SAMPLES + 1)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_((direction_A2[:, None] * ring_S11).flatten())

    def forward(self, query_BQC: Tensor, queries: Points, source_BNC: Tensor, tokens: Points) -> Tensor:
        """What the queries find among the tokens, [B, Q, C], without the bias of the output layer.

        Offsets and logits come from one product: both layers are so narrow that reading the queries is what it costs.
        """
        layers = self.offset, self.logit
        asked_BQ3S = F.linear(
            query_BQC, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        )
        offset_BQ2S, logit_BQS = asked_BQ3S.split([layer.out_features for layer in layers], -1)
        out_BQAD = point_attention(
            self.value(source_BNC).unflatten(-1, (self.heads, -1)),
            tokens.pos_BN2,
            tokens.table,
            queries.pos_BN2,
            offset_BQ2S.unflatten(-1, (self.heads, SAMPLES, 2)),
            logit_BQS.unflatten(-1, (self.heads, SAMPLES)),
            self.tau,
            tokens.canvas_hw,
            backend=self.backend,
        )
        return F.linear(out_BQAD.flatten(2), self.output.weight)


class DecoderStep(nn.Module):
    """Self-attention among the queries, cross-attention to one stage, feed-forward; each x = LN(x + Drop(...))."""

    def __init__(self, dim: int, heads: int, hidden: int, source_dim: int, dropout: float, backend: str) -> None:
        super().__init__()
        self.source = linear(source_dim, dim)
        self.source_norm = LayerNorm(dim)
        self.self_attention = PointAttention(dim, heads, backend)
        self.cross_attention = PointAttention(dim, heads, backend)
        self.ffn = nn.Sequential(projection(dim, hidden), nn.ReLU(), projection(hidden, dim))
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)
        self.dropout, self.backend = dropout, backend

    def forward(self, x_BQC: Tensor, queries: Points, stage_BNC: Tensor, tokens: Points, sine_BNC: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]; `sine_BNC` is the embedding of the tokens' positions."""
        found_BQC = self.self_attention(x_BQC, queries, x_BQC, queries)
        x_BQC = self._join(x_BQC, found_BQC, self.self_attention.output, self.norm1)
        source_BNC = self.source_norm(self.source(stage_BNC)) + sine_BNC.to(x_BQC.dtype)
        found_BQC = self.cross_attention(x_BQC, queries, source_BNC, tokens)
        x_BQC = self._join(x_BQC, found_BQC, self.cross_attention.output, self.norm2)
        first, _, last = self.ffn
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        hidden_BQH = linear_relu(x_BQC, first.weight, first.bias, backend=self.backend)
        return self._join(x_BQC, F.linear(hidden_BQH, last.weight), last, self.norm3)

    def _join(self, x_BQC: Tensor, branch_BQC: Tensor, layer: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        """`branch_BQC` comes without the bias of the `layer` that made it: it is added in the same pass."""
        y_BQC, _ = residual_norm(
            x_BQC,
            branch_BQC,
            norm.weight,
            norm.bias,
            offset_C=layer.bias,
            dropout=self.dropout if self.training else 0.0,
            eps=norm.eps,
            backend=self.backend,
        )
        return y_BQC


class Decoder(nn.Module):
    """Mask tokens at the queries' positions, and one step per encoder stage from the coarsest to the finest."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        size = SIZES[config.size]
        self.dim, self.backend = size.decoder_dim, backend
        hidden = round(self.dim * config.decoder_ffn_ratio)
        self.mask_token = nn.Parameter(torch.empty(self.dim))
        self.sine = SineEmbedding(self.dim)
        self.steps = nn.ModuleList(
            DecoderStep(self.dim, size.decoder_heads, hidden, dim, config.decoder_dropout, backend)
            for dim in reversed(size.dims)
        )
        nn.init.trunc_normal_(self.mask_token, std=STD)

    def forward(self, stages: list[StageOutput], query_pos_BQ2: Tensor, canvas_hw: tuple[int, int]) -> list[Tensor]:
        """Features of the queries, [B, Q, C], after each step.

        Args:
            stages: the encoder's outputs, finest first.
            query_pos_BQ2: int32 (x, y) cells of the queries.
            canvas_hw: height and width of the canvas, in cells.
        """
        queries = Points(query_pos_BQ2, canvas_hw, self.backend)
        sine_BQC = self.sine(query_pos_BQ2, canvas_hw)
        x_BQC = self.mask_token.to(sine_BQC.dtype) + sine_BQC
        outputs: list[Tensor] = []
        for step, stage in zip(self.steps, reversed(stages), strict=True):
            tokens = Points(stage.pos_BN2, canvas_hw, self.backend)
            x_BQC = step(x_BQC, queries, stage.feat_BNC, tokens, self.sine(stage.pos_BN2, canvas_hw))
            outputs.append(x_BQC)
        return outputs
