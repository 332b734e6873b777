"""A decoder step with one kernel per seam, forward and backward written out.

As in `encoder_blocks`, a branch's bias, dropout, the residual addition and the LayerNorm that follows share one kernel
in each direction. Value, offset and logit of the self-attention come from one product, whose columns the attention
kernels read in place; gradients that meet at a query are added in the accumulator of the last product (addmm_). Saved
are the sums before each LayerNorm with their statistics, the other inputs of the products, and the results of both
attentions; LayerNorm outputs are written again by the kernels that differentiate them.

Axes: B batch, Q queries, N tokens, C decoder channels, E channels of the stage, F hidden channels, H heads, S samples,
R rows of a matrix; a row of `asked` holds 2 H S offsets and H S logits, one of `projected` C values before these and
padding after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels import activations
from affmae_kernels.column_sums import column_sums
from affmae_kernels.decoder_step import AttentionWeights, Points, StepWeights
from affmae_kernels.point_attention import triton as attention
from affmae_kernels.point_attention.triton_backward import edge_lists
from affmae_kernels.products import rows, weight_gradient
from affmae_kernels.residual_norm import triton as norm
from affmae_kernels.side_stream import SideStream

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
        drop: dict[str, Any] = {"dropout": dropout, "seed": seed}
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
        ctx.queries, ctx.tokens, ctx.heads, ctx.dropout = queries, tokens, heads, dropout
        ctx.save_for_backward(*parameters, *low, seed, x, feat)
        # Not with `save_for_backward`, which would keep them all to the end of the backward pass.
        ctx.kept = _Kept(
            projected, found1, sum1, stat1, source_in, source, source_stat, value, asked, found2, sum2, stat2, hidden,
            sum3, stat3,
        )  # fmt: skip
        return y3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *parameters, seed, x, feat = ctx.saved_tensors
        w, low = _nested(parameters[: -len(_Lowered._fields)]), _Lowered(*parameters[-len(_Lowered._fields) :])
        (
            projected, found1, sum1, stat1, source_in, source, source_stat, value, asked, found2, sum2, stat2, hidden,
            sum3, stat3,
        ) = ctx.kept  # fmt: skip
        ctx.kept = None
        queries, tokens, heads, dropout = ctx.queries, ctx.tokens, ctx.heads, ctx.dropout
        canvas_hw, pos_BQ2 = queries.canvas_hw, queries.pos_BN2
        channels, used = x.shape[2], x.shape[2] + low.asked.shape[0]
        own_value = projected[..., :channels].unflatten(-1, (heads, -1))
        own_offset, own_logit = _asked(projected[..., channels:used], heads)
        offset, logit = _asked(asked, heads)
        # Where the attentions' samples lie is known; the lists for their gradients are made beside what comes first.
        early = SideStream(x.device, 1)
        lists = early.run(edge_lists, offset, tokens.table, pos_BQ2, value.shape[1], canvas_hw)
        own_lists = early.run(edge_lists, own_offset, queries.table, pos_BQ2, x.shape[1], canvas_hw)
        # Parameter gradients are computed beside the chain of the features' gradients.
        side = SideStream(x.device)
        run = side.run
        drop: dict[str, Any] = {"dropout": dropout, "seed": seed, "sum_branch": True, "run": run}

        # MLP
        of_norm3 = norm.backward(dy.contiguous(), None, sum3, stat3, w.norm3_weight_C, salt=2, **drop)
        dbranch = rows(of_norm3.dbranch)
        dhidden, dhidden_bias = activations.relu_backward(dbranch @ low.last, hidden, run=run)
        dlast = run(weight_gradient, dbranch, hidden)
        dy = _plus_product(of_norm3, dhidden, low.hidden)
        dnorm3, dlast_bias = (of_norm3.dweight, of_norm3.dbias), of_norm3.doffset
        del of_norm3, sum3, hidden, dbranch
        side.turn()

        # Cross-attention: queries, then tokens
        of_norm2 = norm.backward(dy, None, sum2, stat2, w.norm2_weight_C, bias=w.norm2_bias_C, salt=1, **drop)
        dhidden_weight = run(weight_gradient, dhidden, rows(of_norm2.y))
        dbranch = rows(of_norm2.dbranch)
        del sum2, dhidden
        dvalue, dasked = torch.empty_like(value), torch.empty_like(asked)
        early.join()
        dcross_tau = attention.backward(
            (dbranch @ low.cross_out).view_as(found2), value.unflatten(-1, (heads, -1)), offset, logit, tokens.table,
            pos_BQ2, w.cross_attention.tau, canvas_hw, lists=lists, **_gradients_into(dvalue, dasked, heads),
        )  # fmt: skip
        del lists
        dcross_out = run(weight_gradient, dbranch, rows(found2.flatten(2)))
        dcross_value = run(weight_gradient, rows(dvalue), rows(source))
        of_source = norm.backward(
            (rows(dvalue) @ low.value).view_as(source), None, source_in, source_stat, w.source_norm_weight_C,
            sum_branch=True, run=run,
        )  # fmt: skip
        dfeat = (rows(of_source.dx) @ low.source).view_as(feat)
        dsource = run(weight_gradient, rows(of_source.dx), rows(feat))
        dy = _plus_product(of_norm2, rows(dasked), low.asked)
        dnorm2, dcross_out_bias = (of_norm2.dweight, of_norm2.dbias), of_norm2.doffset
        del of_norm2, found2, value, source, dvalue, dbranch
        side.turn()

        # Self-attention
        of_norm1 = norm.backward(dy, None, sum1, stat1, w.norm1_weight_C, bias=w.norm1_bias_C, salt=0, **drop)
        dcross_asked = run(weight_gradient, rows(dasked), rows(of_norm1.y)), run(column_sums, rows(dasked))
        dbranch = rows(of_norm1.dbranch)
        dprojected = torch.empty_like(projected)
        dself_tau = attention.backward(
            (dbranch @ low.self_out).view_as(found1), own_value, own_offset, own_logit, queries.table, pos_BQ2,
            w.self_attention.tau, canvas_hw, lists=own_lists,
            **_gradients_into(dprojected[..., :channels], dprojected[..., channels:used], heads),
        )  # fmt: skip
        dprojected_RP = rows(dprojected)[:, :used]
        dself_out = run(weight_gradient, dbranch, rows(found1.flatten(2)))
        dmatrix = run(weight_gradient, dprojected_RP, rows(x))
        dself_asked = dmatrix[channels:], run(column_sums, dprojected_RP[:, channels:])
        dx = _plus_product(of_norm1, dprojected_RP, low.self_matrix[:used])
        # The weights of a query sum to 1, so the gradients of the values sum to that of the attention's result.
        dself_bias = run(torch.mv, w.self_attention.out_weight_CC.detach().t(), of_norm1.doffset)
        dcross_bias = run(torch.mv, w.cross_attention.out_weight_CC.detach().t(), dcross_out_bias)
        side.join()

        own = AttentionWeights(
            dmatrix[:channels], dself_bias, *_split_asked(dself_asked, w), dself_out, of_norm1.doffset, dself_tau
        )
        cross = AttentionWeights(
            dcross_value, dcross_bias, *_split_asked(dcross_asked, w), dcross_out, dcross_out_bias, dcross_tau
        )
        gradients = StepWeights(
            dsource, of_source.doffset, of_source.dweight, of_source.dbias, own, of_norm1.dweight, of_norm1.dbias,
            cross, *dnorm2, dhidden_weight, dhidden_bias, dlast, dlast_bias, *dnorm3,
        )  # fmt: skip
        return dx, dfeat, None, None, None, None, None, *_flat(gradients)


class _PlaceTokens(torch.autograd.Function):
    """The sum is made once per cell instead of once per token, and the token's gradient is a sum over rows."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, code: Tensor, cell: Tensor) -> Tensor:
        return (code + token.to(code.dtype))[cell]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return column_sums(rows(dx.contiguous())), None, None


def place_tokens(token_C: Tensor, code_TC: Tensor, cell_BN: Tensor) -> Tensor:
    """See the package."""
    placed: Tensor = _PlaceTokens.apply(token_C, code_TC, cell_BN)
    return placed


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass, in the order of the computation."""

    projected_BQP: Tensor
    found1_BQHD: Tensor
    sum1_BQC: Tensor
    stat1_R2: Tensor
    source_in_BNC: Tensor
    source_BNC: Tensor
    source_stat_R2: Tensor
    value_BNC: Tensor
    asked_BQA: Tensor
    found2_BQHD: Tensor
    sum2_BQC: Tensor
    stat2_R2: Tensor
    hidden_RF: Tensor
    sum3_BQC: Tensor
    stat3_R2: Tensor


def _plus_product(of_norm: norm.Gradients, left_RA: Tensor, right_AC: Tensor) -> Tensor:
    """The gradient of the sum plus a product, like the sum; in place, unless it is the branch's gradient as well, which
    is read at the same time."""
    dx_RC = rows(of_norm.dx)
    if of_norm.dbranch is of_norm.dx:
        return torch.addmm(dx_RC, left_RA, right_AC).view_as(of_norm.dx)
    return dx_RC.addmm_(left_RA, right_AC).view_as(of_norm.dx)


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


def _split_asked(gradients: tuple[Tensor, Tensor], w: StepWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of offset_weight, offset_bias, logit_weight and logit_bias from those of both layers together."""
    lengths = len(w.self_attention.offset_bias_O), len(w.self_attention.logit_bias_L)
    (doffset_weight, dlogit_weight), (doffset_bias, dlogit_bias) = (both.split(lengths) for both in gradients)
    return doffset_weight, doffset_bias, dlogit_weight, dlogit_bias


def _flat(weights: StepWeights) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in weights:
        flat += value if isinstance(value, AttentionWeights) else [value]
    return flat


def _nested(flat: Sequence[Tensor]) -> StepWeights:
    remaining = iter(flat)
    fields: dict[str, Any] = {
        name: AttentionWeights(*islice(remaining, _ATTENTION)) if "attention" in name else next(remaining)
        for name in StepWeights._fields
    }
    return StepWeights(**fields)
