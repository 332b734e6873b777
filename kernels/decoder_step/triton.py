"""A decoder step with one kernel per seam, forward and backward written out.

As in `encoder_blocks`, a branch's bias, dropout, the residual addition and the LayerNorm that follows share one kernel
in each direction. Value, offset and logit of the self-attention come from one product, whose columns the attention
kernels read in place; gradients that meet at a query are added in the accumulator of the last product (addmm). Saved are
the inputs of the products, the sums before each LayerNorm with their statistics, and the results of both attentions.

Axes: B batch, Q queries, N tokens, C decoder channels, E channels of the stage, F hidden channels, H heads, S samples,
R rows of a matrix; a row of `asked` holds 2 H S offsets and H S logits, one of `projected` C values before these and
padding after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels import activations
from affmae_kernels.column_sums import column_sums
from affmae_kernels.decoder_step import AttentionWeights, Points, StepWeights
from affmae_kernels.point_attention import triton as attention
from affmae_kernels.products import rows, weight_gradient
from affmae_kernels.residual_norm import triton as norm

_ATTENTION = len(AttentionWeights._fields)
_ALIGNED = 16
"""Columns of the self-attention's product are padded to a multiple: Triton then loads 16 bytes of a row at a time."""


def decoder_step(
    x_BQC: Tensor,
    queries: Points,
    feat_BNE: Tensor,
    tokens: Points,
    code_TC: Tensor,
    weights: StepWeights,
    heads: int,
    dropout: float,
) -> Tensor:
    """See the package for the formula and the shapes."""
    return _DecoderStep.apply(
        x_BQC.contiguous(), feat_BNE.contiguous(), queries, tokens, code_TC.contiguous(), heads, dropout,
        *_flat(weights),
    )  # fmt: skip


class _DecoderStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, feat: Tensor, queries: Points, tokens: Points, code: Tensor, heads: int, dropout: float,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        w = _nested(parameters)
        low = _lowered(w, x.dtype)
        seed = torch.randint(2**31 - 1, (3,), dtype=torch.int32, device=x.device) if dropout else None
        drop = {"dropout": dropout, "seed": seed}
        channels = x.shape[2]
        # The queries ask each other.
        projected = torch.addmm(low.self_bias, rows(x), low.self_matrix.t()).view(*x.shape[:2], -1)
        used = channels + low.asked.shape[0]
        found1 = attention.forward(
            projected[..., :channels].unflatten(-1, (heads, -1)), *_asked(projected[..., channels:used], heads),
            queries.table, queries.pos_BN2, w.self_attention.tau, queries.canvas_hw,
        )  # fmt: skip
        branch = (rows(found1.flatten(2)) @ low.self_out.t()).view_as(x)
        y1, sum1, stat1 = norm.forward(
            x, w.norm1_weight_C, w.norm1_bias_C, branch=branch, offset=w.self_attention.out_bias_C, salt=0, **drop
        )
        # They ask the tokens of the stage.
        source_in = torch.addmm(low.source_bias, rows(feat), low.source.t()).view(*feat.shape[:2], -1)
        source, _, source_stat = norm.forward(
            source_in, w.source_norm_weight_C, w.source_norm_bias_C, code=code, cell=tokens.cell_BN
        )
        value = torch.addmm(low.value_bias, rows(source), low.value.t()).view_as(source)
        asked = torch.addmm(low.asked_bias, rows(y1), low.asked.t()).view(*x.shape[:2], -1)
        found2 = attention.forward(
            value.unflatten(-1, (heads, -1)), *_asked(asked, heads), tokens.table, queries.pos_BN2,
            w.cross_attention.tau, tokens.canvas_hw,
        )  # fmt: skip
        branch = (rows(found2.flatten(2)) @ low.cross_out.t()).view_as(x)
        y2, sum2, stat2 = norm.forward(
            y1, w.norm2_weight_C, w.norm2_bias_C, branch=branch, offset=w.cross_attention.out_bias_C, salt=1, **drop
        )
        # Each query on its own.
        hidden = torch._addmm_activation(low.hidden_bias, rows(y2), low.hidden.t())
        branch = (hidden @ low.last.t()).view_as(x)
        y3, sum3, stat3 = norm.forward(
            y2, w.norm3_weight_C, w.norm3_bias_C, branch=branch, offset=w.last_bias_C, salt=2, **drop
        )
        ctx.queries, ctx.tokens, ctx.heads, ctx.dropout, ctx.parameters = (
            queries,
            tokens,
            heads,
            dropout,
            len(parameters),
        )
        ctx.save_for_backward(
            *parameters, *low, seed, x, feat, projected, found1, y1, sum1, stat1, source_in, source, source_stat, value,
            asked, found2, y2, sum2, stat2, hidden, sum3, stat3,
        )  # fmt: skip
        return y3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        count, width = ctx.parameters, len(_Lowered._fields)
        w, low = _nested(ctx.saved_tensors[:count]), _Lowered(*ctx.saved_tensors[count : count + width])
        (
            seed, x, feat, projected, found1, y1, sum1, stat1, source_in, source, source_stat, value, asked, found2, y2,
            sum2, stat2, hidden, sum3, stat3,
        ) = ctx.saved_tensors[count + width :]  # fmt: skip
        queries, tokens, heads = ctx.queries, ctx.tokens, ctx.heads
        drop = {"dropout": ctx.dropout, "seed": seed, "sum_branch": True}
        channels = x.shape[2]
        # MLP
        of_norm3 = norm.backward(dy.contiguous(), None, sum3, stat3, w.norm3_weight_C, salt=2, **drop)
        dbranch = rows(of_norm3.dbranch)
        dhidden, dhidden_bias = activations.relu_backward(dbranch @ low.last, hidden)
        dlast = weight_gradient(dbranch, hidden), of_norm3.doffset
        dhidden_weight = weight_gradient(dhidden, rows(y2))
        dy = torch.addmm(rows(of_norm3.dx), dhidden, low.hidden).view_as(x)
        # Cross-attention: queries, then tokens
        of_norm2 = norm.backward(dy, None, sum2, stat2, w.norm2_weight_C, salt=1, **drop)
        dbranch = rows(of_norm2.dbranch)
        dvalue, dasked = torch.empty_like(value), torch.empty_like(asked)
        dcross_tau = attention.backward(
            (dbranch @ low.cross_out).view_as(found2), value.unflatten(-1, (heads, -1)), *_asked(asked, heads),
            tokens.table, queries.pos_BN2, w.cross_attention.tau, tokens.canvas_hw,
            **_gradients_into(dvalue, dasked, heads),
        )  # fmt: skip
        dcross = AttentionWeights(
            weight_gradient(rows(dvalue), rows(source)),
            _value_bias_gradient(of_norm2, w.cross_attention),
            *_asked_gradients(rows(dasked), rows(y1), w.cross_attention),
            weight_gradient(dbranch, rows(found2.flatten(2))),
            of_norm2.doffset,
            dcross_tau,
        )
        of_source = norm.backward(
            (rows(dvalue) @ low.value).view_as(source), None, source_in, source_stat, w.source_norm_weight_C,
            sum_branch=True,
        )  # fmt: skip
        dsource_in = rows(of_source.dx)
        dfeat = (dsource_in @ low.source).view_as(feat)
        dy = torch.addmm(rows(of_norm2.dx), rows(dasked), low.asked).view_as(x)
        # Self-attention
        of_norm1 = norm.backward(dy, None, sum1, stat1, w.norm1_weight_C, salt=0, **drop)
        dbranch = rows(of_norm1.dbranch)
        dprojected, used = torch.empty_like(projected), channels + low.asked.shape[0]
        dself_tau = attention.backward(
            (dbranch @ low.self_out).view_as(found1), projected[..., :channels].unflatten(-1, (heads, -1)),
            *_asked(projected[..., channels:used], heads), queries.table, queries.pos_BN2, w.self_attention.tau,
            queries.canvas_hw, **_gradients_into(dprojected[..., :channels], dprojected[..., channels:used], heads),
        )  # fmt: skip
        dprojected_RP = rows(dprojected)[:, :used]
        dmatrix = weight_gradient(dprojected_RP, rows(x))
        asked_rows = len(w.self_attention.offset_bias_O), len(w.self_attention.logit_bias_L)
        doffset_weight, dlogit_weight = dmatrix[channels:].split(asked_rows)
        doffset_bias, dlogit_bias = column_sums(dprojected_RP[:, channels:]).split(asked_rows)
        dself = AttentionWeights(
            dmatrix[:channels], _value_bias_gradient(of_norm1, w.self_attention), doffset_weight, doffset_bias,
            dlogit_weight, dlogit_bias, weight_gradient(dbranch, rows(found1.flatten(2))), of_norm1.doffset, dself_tau,
        )  # fmt: skip
        dx = torch.addmm(rows(of_norm1.dx), dprojected_RP, low.self_matrix[:used]).view_as(x)
        gradients = StepWeights(
            weight_gradient(dsource_in, rows(feat)), of_source.doffset, of_source.dweight, of_source.dbias, dself,
            of_norm1.dweight, of_norm1.dbias, dcross, of_norm2.dweight, of_norm2.dbias, dhidden_weight, dhidden_bias,
            *dlast, of_norm3.dweight, of_norm3.dbias,
        )  # fmt: skip
        return dx, dfeat, None, None, None, None, None, *_flat(gradients)


class _Lowered(NamedTuple):
    """The parameters that take part in matrix products, in the features' dtype, those of one product side by side."""

    self_matrix: Tensor
    """Value, offset and logit of the self-attention, and rows of zeros up to a multiple of `_ALIGNED`, [P, C]."""
    self_bias: Tensor
    self_out: Tensor
    source: Tensor
    source_bias: Tensor
    value: Tensor
    value_bias: Tensor
    asked: Tensor
    """Offset and logit of the cross-attention, [3 H S, C]."""
    asked_bias: Tensor
    cross_out: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    last: Tensor


def _lowered(w: StepWeights, dtype: torch.dtype) -> _Lowered:
    own, other = w.self_attention, w.cross_attention
    parts: list[tuple[Tensor, ...]] = [
        (own.value_weight_CC, own.offset_weight_OC, own.logit_weight_LC),
        (own.value_bias_C, own.offset_bias_O, own.logit_bias_L),
        (own.out_weight_CC,),
        (w.source_weight_CE,),
        (w.source_bias_C,),
        (other.value_weight_CC,),
        (other.value_bias_C,),
        (other.offset_weight_OC, other.logit_weight_LC),
        (other.offset_bias_O, other.logit_bias_L),
        (other.out_weight_CC,),
        (w.hidden_weight_FC,),
        (w.hidden_bias_F,),
        (w.last_weight_CF,),
    ]
    whole: list[Tensor] = []
    targets: list[Tensor] = []
    for index, tensors in enumerate(parts):
        lengths = [len(tensor) for tensor in tensors]
        padding = -sum(lengths) % _ALIGNED if index < 2 else 0
        whole.append(tensors[0].new_empty(sum(lengths) + padding, *tensors[0].shape[1:], dtype=dtype))
        targets += whole[-1].split([*lengths, padding])[: len(lengths)]
        if padding:
            whole[-1][-padding:].zero_()
    # All copies by a launch or two.
    torch._foreach_copy_(targets, [tensor.detach() for tensors in parts for tensor in tensors])
    return _Lowered(*whole)


def _asked(asked_BQA: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Offsets [B, Q, H, S, 2] and logits [B, Q, H, S], as views."""
    logits = asked_BQA.shape[-1] // 3
    offset, logit = asked_BQA.split([2 * logits, logits], -1)
    return offset.unflatten(-1, (heads, -1, 2)), logit.unflatten(-1, (heads, -1))


def _gradients_into(dvalue_BNC: Tensor, dasked_BQA: Tensor, heads: int) -> dict[str, Tensor]:
    """Where the attention's backward pass writes."""
    doffset, dlogit = _asked(dasked_BQA, heads)
    return {"dvalue_BNHD": dvalue_BNC.unflatten(-1, (heads, -1)), "doffset_BQHS2": doffset, "dlogit_BQHS": dlogit}


def _value_bias_gradient(of_norm: norm.Gradients, w: AttentionWeights) -> Tensor:
    """The weights of a query sum to 1, so the values' gradients sum to that of the attention's result: the sum of the
    branch's gradient, taken through the output layer, without a pass over the values."""
    assert of_norm.doffset is not None
    return of_norm.doffset @ w.out_weight_CC.detach()


def _asked_gradients(dasked_RA: Tensor, query_RC: Tensor, w: AttentionWeights) -> tuple[Tensor, ...]:
    """Gradients of offset_weight, offset_bias, logit_weight and logit_bias."""
    lengths = len(w.offset_bias_O), len(w.logit_bias_L)
    doffset_weight, dlogit_weight = weight_gradient(dasked_RA, query_RC).split(lengths)
    doffset_bias, dlogit_bias = column_sums(dasked_RA).split(lengths)
    return doffset_weight, doffset_bias, dlogit_weight, dlogit_bias


def _flat(weights: StepWeights) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in weights:
        flat += value if isinstance(value, AttentionWeights) else [value]
    return flat


def _nested(flat: Sequence[Tensor]) -> StepWeights:
    remaining = iter(flat)
    fields = [
        AttentionWeights(*(next(remaining) for _ in range(_ATTENTION))) if "attention" in name else next(remaining)
        for name in StepWeights._fields
    ]
    return StepWeights(*fields)
