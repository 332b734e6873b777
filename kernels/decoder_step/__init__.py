"""One step of the decoder: the queries ask each other, then the tokens of one encoder stage (method 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from affmae_kernels import point_attention, residual_norm
from affmae_kernels.decoder_step import reference
from affmae_kernels.dispatch import choose_backend, fp32_only
from affmae_kernels.point_attention import NearestTable, nearest_table
from affmae_kernels.precision import feature_dtype, without_autocast

__all__ = ["AttentionWeights", "Points", "StepWeights", "decoder_step", "place_tokens", "points"]


class Points(NamedTuple):
    """A set of tokens or queries on the canvas."""

    pos_BN2: Tensor
    """int32 (x, y) cells."""
    cell_BN: Tensor
    """int32 canvas indices of the same cells."""
    table: NearestTable
    """The points nearest to every cell."""
    canvas_hw: tuple[int, int]
    """Height and width of the canvas, in cells."""


def points(pos_BN2: Tensor, canvas_hw: tuple[int, int], *, backend: str = "auto") -> Points:
    """The points at int32 (x, y) cells [B, N, 2]; see `nearest_table` for errors."""
    cell_BN = pos_BN2[..., 1] * canvas_hw[1] + pos_BN2[..., 0]
    return Points(pos_BN2, cell_BN, nearest_table(pos_BN2, canvas_hw, backend=backend), canvas_hw)


class AttentionWeights(NamedTuple):
    """Parameters of one point attention with H heads and S samples; all floating."""

    value_weight_CC: Tensor
    value_bias_C: Tensor
    offset_weight_OC: Tensor
    """To H * S offsets (x, y)."""
    offset_bias_O: Tensor
    logit_weight_LC: Tensor
    """To H * S logits."""
    logit_bias_L: Tensor
    out_weight_CC: Tensor
    out_bias_C: Tensor
    tau: Tensor


class StepWeights(NamedTuple):
    """Parameters of one decoder step; C decoder channels, E channels of the stage, F hidden channels; all floating."""

    source_weight_CE: Tensor
    source_bias_C: Tensor
    source_norm_weight_C: Tensor
    source_norm_bias_C: Tensor
    self_attention: AttentionWeights
    norm1_weight_C: Tensor
    norm1_bias_C: Tensor
    cross_attention: AttentionWeights
    norm2_weight_C: Tensor
    norm2_bias_C: Tensor
    hidden_weight_FC: Tensor
    hidden_bias_F: Tensor
    last_weight_CF: Tensor
    last_bias_C: Tensor
    norm3_weight_C: Tensor
    norm3_bias_C: Tensor


def decoder_step(
    x_BQC: Tensor,
    queries: Points,
    feat_BNE: Tensor,
    tokens: Points,
    code_TC: Tensor,
    weights: StepWeights,
    heads: int,
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """One post-norm step with point attention PA (see `affmae_kernels.point_attention`):

        source = LN(linear(feat)) + code[cell of the token]
        x = LN(x + Drop(PA(x, x))),   x = LN(x + Drop(PA(x, source))),   x = LN(x + Drop(MLP(x))),   MLP with ReLU

    Everything is computed in `precision.feature_dtype` of x, with fp32 statistics and softmax.

    Args:
        x_BQC: features of the queries; floating.
        queries: where they are.
        feat_BNE: features of the stage's tokens; floating.
        tokens: where these are; same canvas.
        code_TC: position code of each of the T canvas cells; floating. No gradient.
        weights: parameters.
        heads: of both attentions.
        dropout: probability that an element of a branch is dropped; 0 outside training. Backends draw different
            numbers.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        The queries' features after the step, like x. Gradients: both features and all parameters.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(x_BQC, queries, feat_BNE, tokens, code_TC, weights, heads, dropout)
    dtype = feature_dtype(x_BQC)
    (batch, count, channels), samples = x_BQC.shape, len(weights.self_attention.logit_bias_L) // heads
    values = torch.Size((batch, count, heads, channels // heads))
    obstacle = (
        point_attention.unsupported(dtype, values, count, samples, queries.table)
        or point_attention.unsupported(dtype, values, count, samples, tokens.table)
        or residual_norm.unsupported(dtype, channels)
        or fp32_only(weights.norm1_weight_C)
    )
    choice = choose_backend(backend, "decoder_step", x_BQC.device, obstacle)
    with without_autocast(x_BQC):
        arguments = x_BQC.to(dtype), queries, feat_BNE.to(dtype), tokens, code_TC.to(dtype), weights, heads, dropout
        if choice.name == "triton":
            from affmae_kernels.decoder_step import triton

            return triton.decoder_step(*arguments)
        return reference.decoder_step(*arguments)


def place_tokens(token_C: Tensor, code_TC: Tensor, cell_BN: Tensor, *, backend: str = "auto") -> Tensor:
    """token + code[cell]: one learned token at every place, with the place's code.

    Args:
        token_C: floating.
        code_TC: code of every canvas cell, in the dtype of the result. No gradient.
        cell_BN: int32 canvas indices.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        [B, N, C] in the dtype of `code_TC`. Gradient: the token.

    Raises:
        ValueError: when token and code differ in width.
    """
    if token_C.shape != code_TC.shape[1:]:
        raise ValueError(f"token_C must be [{code_TC.shape[1]}], as code_TC; got {list(token_C.shape)}")
    choice = choose_backend(backend, "decoder_step", code_TC.device, fp32_only(token_C))
    with without_autocast(code_TC):
        if choice.name == "triton":
            from affmae_kernels.decoder_step import triton

            return triton.place_tokens(token_C, code_TC, cell_BN)
        return reference.place_tokens(token_C, code_TC, cell_BN)


def _check(
    x_BQC: Tensor, queries: Points, feat_BNE: Tensor, tokens: Points, code_TC: Tensor, weights: StepWeights, heads: int,
    dropout: float,
) -> None:  # fmt: skip
    for name, features, where in (("x_BQC", x_BQC, queries), ("feat_BNE", feat_BNE, tokens)):
        expected = list(where.pos_BN2.shape[:2])
        if features.ndim != 3 or not features.is_floating_point() or list(features.shape[:2]) != expected:
            raise ValueError(
                f"{name} must be floating with one row per point {expected}; got {features.dtype} "
                f"{list(features.shape)}"
            )
    channels = x_BQC.shape[2]
    if channels % heads:
        raise ValueError(f"{heads} heads do not divide {channels} channels")
    if queries.canvas_hw != tokens.canvas_hw or code_TC.shape != (
        queries.canvas_hw[0] * queries.canvas_hw[1],
        channels,
    ):
        raise ValueError(
            f"queries, tokens and code must share a canvas; got {queries.canvas_hw}, {tokens.canvas_hw} and a code of "
            f"{list(code_TC.shape)}"
        )
    if weights.source_weight_CE.shape != (channels, feat_BNE.shape[2]):
        raise ValueError(
            f"source_weight_CE {list(weights.source_weight_CE.shape)} does not map {feat_BNE.shape[2]} to {channels} "
            "channels"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")
