"""A decoder step in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.point_attention.reference import point_attention
from affmae_kernels.precision import layer_norm, linear

if TYPE_CHECKING:
    from affmae_kernels.decoder_step import AttentionWeights, Points, StepWeights


def decoder_step(
    x_BQC: Tensor,
    queries: Points,
    feat_BNE: Tensor,
    tokens: Points,
    code_TC: Tensor,
    w: StepWeights,
    heads: int,
    dropout: float,
) -> Tensor:
    """See the package for the formula and the shapes."""
    # The queries ask each other.
    found_BQC = _attention(x_BQC, queries, x_BQC, queries, w.self_attention, heads)
    x_BQC = layer_norm(x_BQC + F.dropout(found_BQC, dropout), w.norm1_weight_C, w.norm1_bias_C)
    # They ask the tokens of the stage, which come to the decoder's width and know where they are.
    source_BNC = layer_norm(
        linear(feat_BNE, w.source_weight_CE, w.source_bias_C), w.source_norm_weight_C, w.source_norm_bias_C
    )
    source_BNC = source_BNC + code_TC[tokens.cell_BN]
    found_BQC = _attention(x_BQC, queries, source_BNC, tokens, w.cross_attention, heads)
    x_BQC = layer_norm(x_BQC + F.dropout(found_BQC, dropout), w.norm2_weight_C, w.norm2_bias_C)
    # Each query on its own.
    hidden_BQF = F.relu(linear(x_BQC, w.hidden_weight_FC, w.hidden_bias_F))
    found_BQC = linear(hidden_BQF, w.last_weight_CF, w.last_bias_C)
    return layer_norm(x_BQC + F.dropout(found_BQC, dropout), w.norm3_weight_C, w.norm3_bias_C)


def place_tokens(token_C: Tensor, code_TC: Tensor, cell_BN: Tensor) -> Tensor:
    """See the package."""
    return token_C.to(code_TC.dtype) + code_TC[cell_BN]


def _attention(
    x_BQC: Tensor, queries: Points, source_BNC: Tensor, tokens: Points, w: AttentionWeights, heads: int
) -> Tensor:
    """Point attention of the queries to the source, between its projections."""
    out_BQHD = point_attention(
        linear(source_BNC, w.value_weight_CC, w.value_bias_C).unflatten(-1, (heads, -1)),
        tokens.pos_BN2,
        tokens.table.table_BT4,
        queries.pos_BN2,
        linear(x_BQC, w.offset_weight_OC, w.offset_bias_O).unflatten(-1, (heads, -1, 2)),
        linear(x_BQC, w.logit_weight_LC, w.logit_bias_L).unflatten(-1, (heads, -1)),
        w.tau,
        tokens.canvas_hw,
    )
    return linear(out_BQHD.flatten(2), w.out_weight_CC, w.out_bias_C)
