"""The blocks of an encoder stage with one kernel per seam, forward and backward written out.

Automatic differentiation needs a pass of its own for every residual addition, LayerNorm, cast and bias gradient between
the matrix products. Here a branch's bias, stochastic depth, the residual addition and the LayerNorm that follows share
one kernel in each direction (residual_norm), and GELU shares one with its bias. A branch therefore travels without
its bias to the next seam:

    y, s = LN(s + scale (branch + offset))     with offset, scale of the branch that arrives

Saved per block: both sums s with their statistics, qkv, the attention's output with its log-sum-exp, and the MLP's
hidden features before the activation. LayerNorm and GELU outputs are written again by the kernels that differentiate
them. Weight gradients are fp32.

Axes: B batch, N tokens, C channels, H heads of width D, F hidden channels, R = B * N rows, S = 2 * blocks branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels import activations
from affmae_kernels.cluster_attention import triton as attention
from affmae_kernels.encoder_blocks import BlockWeights
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.products import lowered, rows, weight_gradient
from affmae_kernels.residual_norm import triton as norm
from affmae_kernels.side_stream import SideStream

_PARAMETERS = len(BlockWeights._fields)


class _Saved(NamedTuple):
    """What the backward pass needs of one block."""

    sum1_BNC: Tensor
    stat1_N2: Tensor
    qkv_BN3HD: Tensor
    attended_BNHD: Tensor
    lse_BHN: Tensor
    sum2_BNC: Tensor
    stat2_N2: Tensor
    hidden_RF: Tensor


def encoder_blocks(
    feat_BNC: Tensor,
    blocks: Sequence[BlockWeights],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    near: Neighbourhoods,
    branch_scale_SB: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package for the formula and the shapes."""
    scale_SB = None if branch_scale_SB is None else branch_scale_SB.float().contiguous()
    parameters = [tensor for block in blocks for tensor in block]
    return _EncoderBlocks.apply(feat_BNC.contiguous(), near, scale_SB, norm_weight_C, norm_bias_C, *parameters)


class _EncoderBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, near: Neighbourhoods, scale_SB: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        blocks = _blocks(parameters)
        matrices = _lowered(blocks, x.dtype)
        saved: list[Tensor] = []
        branch: Tensor | None = None
        offset: Tensor | None = None
        for index, (block, low) in enumerate(zip(blocks, matrices, strict=True)):
            heads, width = block.blank_key_HD.shape
            # The branch of the block before joins the residual stream; attention of the normalized sum.
            y, x, stat1 = norm.forward(
                x, block.norm1_weight_C, block.norm1_bias_C, branch=branch, offset=offset,
                scale=_scale(scale_SB, 2 * index - 1),
            )  # fmt: skip
            sum1 = x
            qkv = torch.addmm(low.qkv_bias, rows(y), low.qkv.t()).view(*x.shape[:2], 3, heads, width)
            attended, lse = attention.forward(
                qkv, near, block.position_weight_H5, block.position_bias_H, block.blank_key_HD, block.blank_value_HD
            )
            branch, offset = (rows(attended.flatten(2)) @ low.out.t()).view_as(x), block.out_bias_C
            # It joins the stream; MLP of the normalized sum.
            y, x, stat2 = norm.forward(
                x, block.norm2_weight_C, block.norm2_bias_C, branch=branch, offset=offset,
                scale=_scale(scale_SB, 2 * index),
            )  # fmt: skip
            hidden = rows(y) @ low.hidden.t()
            branch = (activations.gelu_forward(hidden, block.hidden_bias_F) @ low.last.t()).view_as(x)
            offset = block.last_bias_C
            saved += _Saved(sum1, stat1, qkv, attended, lse, x, stat2, hidden)
        y, x, stat = norm.forward(
            x, norm_weight, norm_bias, branch=branch, offset=offset, scale=_scale(scale_SB, 2 * len(blocks) - 1)
        )
        ctx.near, ctx.count = near, len(blocks)
        ctx.save_for_backward(
            x, stat, scale_SB, norm_weight, *parameters, *(m for low in matrices for m in low), *saved
        )
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:
        total, stat, scale_SB, norm_weight, *rest = ctx.saved_tensors
        count = ctx.count
        first_low = _PARAMETERS * count
        first_saved = first_low + len(_Lowered._fields) * count
        blocks = _blocks(rest[:first_low])
        lows = [_Lowered(*fields) for fields in _groups(rest[first_low:first_saved], len(_Lowered._fields))]
        kept = [_Saved(*fields) for fields in _groups(rest[first_saved:], len(_Saved._fields))]
        # Parameter gradients are computed beside the chain of the features' gradients.
        side = SideStream(total.device)
        run = side.run
        # The LayerNorm after the last block; what it leaves is the gradient of the last MLP's branch.
        found = norm.backward(
            torch.zeros_like(total) if dy is None else dy.contiguous(), None if dx is None else dx.contiguous(),
            total, stat, norm_weight, scale=_scale(scale_SB, 2 * count - 1), sum_branch=True, run=run,
        )  # fmt: skip
        dnorm = found.dweight, found.dbias
        gradients: list[Tensor | None] = []
        for index in reversed(range(count)):
            block, low, saved = blocks[index], lows[index], kept[index]
            # MLP
            dlast_bias, dbranch = found.doffset, rows(found.dbranch)
            dhidden, activated, dhidden_bias = activations.gelu_backward(
                dbranch @ low.last, saved.hidden_RF, block.hidden_bias_F, recompute=True, run=run
            )
            assert activated is not None
            dlast_weight = run(weight_gradient, dbranch, activated)
            found = norm.backward(
                (dhidden @ low.hidden).view_as(total), found.dx, saved.sum2_BNC, saved.stat2_N2, block.norm2_weight_C,
                bias=block.norm2_bias_C, scale=_scale(scale_SB, 2 * index), sum_branch=True, run=run,
            )  # fmt: skip
            dhidden_weight = run(weight_gradient, dhidden, rows(found.y))
            dnorm2 = found.dweight, found.dbias
            # Attention
            dout_bias, dbranch = found.doffset, rows(found.dbranch)
            attended = saved.attended_BNHD
            dout_weight = run(weight_gradient, dbranch, rows(attended.flatten(2)))
            dqkv, dposition_weight, dposition_bias, dblank_key, dblank_value, dq_sum, dout_sum = attention.backward(
                (dbranch @ low.out).view_as(attended), saved.qkv_BN3HD, ctx.near, block.position_weight_H5,
                block.position_bias_H, block.blank_key_HD, block.blank_value_HD, attended, saved.lse_BHN, run=run,
            )  # fmt: skip
            dqkv = rows(dqkv.flatten(2))
            found = norm.backward(
                (dqkv @ low.qkv).view_as(total), found.dx, saved.sum1_BNC, saved.stat1_N2, block.norm1_weight_C,
                bias=block.norm1_bias_C, scale=_scale(scale_SB, 2 * index - 1), sum_branch=index > 0, run=run,
            )  # fmt: skip
            dqkv_bias = run(_qkv_bias_gradient, dq_sum, dblank_key, dout_sum, dblank_value)
            gradients = [
                found.dweight, found.dbias, run(weight_gradient, dqkv, rows(found.y)), dqkv_bias, dposition_weight,
                dposition_bias, dblank_key, dblank_value, dout_weight, dout_bias, *dnorm2, dhidden_weight, dhidden_bias,
                dlast_weight, dlast_bias, *gradients,
            ]  # fmt: skip
            del dhidden, activated
            side.turn()
        side.join()
        return found.dx, None, None, *dnorm, *gradients


def _qkv_bias_gradient(dq_sum: Tensor, dblank_key: Tensor, dout_sum: Tensor, dblank_value: Tensor) -> Tensor:
    """A constant added to all keys shifts every logit but the blank one, and the weights of a query sum to 1: the bias
    gradients of keys and values follow from those of the blank token, without a pass over dqkv."""
    return torch.stack([dq_sum, -dblank_key, dout_sum - dblank_value]).flatten()


class _Lowered(NamedTuple):
    """The parameters that take part in matrix products, in the features' dtype."""

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    hidden: Tensor
    last: Tensor


def _lowered(blocks: Sequence[BlockWeights], dtype: torch.dtype) -> list[_Lowered]:
    wanted = [
        tensor
        for b in blocks
        for tensor in (b.qkv_weight_3CC, b.qkv_bias_3C, b.out_weight_CC, b.hidden_weight_FC, b.last_weight_CF)
    ]
    return [_Lowered(*fields) for fields in _groups(lowered(wanted, dtype), len(_Lowered._fields))]


def _blocks(parameters: Sequence[Tensor]) -> list[BlockWeights]:
    return [BlockWeights(*fields) for fields in _groups(parameters, _PARAMETERS)]


def _groups(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[at : at + size] for at in range(0, len(tensors), size)]


def _scale(scale_SB: Tensor | None, index: int) -> Tensor | None:
    """The factors of one branch; None before the first."""
    return None if scale_SB is None or index < 0 else scale_SB[index]
