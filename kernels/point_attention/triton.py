"""Point attention in Triton: everything between the projections in one forward kernel.

Forward, per query and head: 4 samples look up the packed nearest tokens of their cells, weigh them by
softmax(-relu(tau) * distance), mix the samples by softmax(logits), and gather 16 rows of values. Nothing is saved but
the inputs; the backward (`triton_backward`) computes the weights again. No result depends on the order in which
programs run.

Values, offsets and logits may be slices of one wider matrix: the kernels take the distance of two rows. The kernels
read values 16 bytes at a time if this distance is a multiple of 16 elements.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.point_attention import NearestTable
from affmae_kernels.point_attention.triton_backward import backward
from affmae_kernels.point_attention.triton_sample import (
    ROWS,
    SAMPLES,
    gather,
    in_rows,
    launch_config,
    owners,
    positive,
    program,
    sample,
)

__all__ = ["backward", "forward", "point_attention"]


@triton.jit(do_not_specialize=["NQ", "N", "OFFSET_STRIDE", "LOGIT_STRIDE", "CANVAS_H", "CANVAS_W"])
def _points_fwd_kernel(
    QUERY_POS,
    OFFSET,
    LOGIT,
    PACKED,
    VALUE,
    TAU,
    OUT,
    NQ,
    N,
    OFFSET_STRIDE,
    LOGIT_STRIDE,
    VALUE_STRIDE,
    CANVAS_H,
    CANVAS_W,
    H: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    QB: tl.constexpr,
):
    """One program: QB queries of one head of one image."""
    tile, h, b = program()
    tau = positive(tl.load(TAU).to(tl.float32))
    q = tile * QB + tl.arange(0, QB)
    live = q < NQ
    # Queries beyond the last repeat it; their results are not stored.
    q = tl.minimum(q, NQ - 1)
    mix, near, _, _, _, packed, _ = sample(
        QUERY_POS, OFFSET, LOGIT, PACKED, tau, b, h, q, NQ, OFFSET_STRIDE, LOGIT_STRIDE, CANVAS_H, CANVAS_W, S
    )
    # Weighted sum of S * 4 rows.
    weight = owners(tl.reshape(near * mix[:, None, :], [S * 4, QB]))
    value = gather(VALUE, packed, b, h, N, VALUE_STRIDE, S, D, QB)
    out = tl.sum(value * weight[:, :, None], ROWS)
    # [QB, D]
    to = OUT + b * NQ * (H * D) + h * D + (q * (H * D))[:, None] + tl.arange(0, D)[None, :]
    tl.store(to, out.to(OUT.dtype.element_ty), mask=live[:, None])


def forward(
    value_BNHD: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    table: NearestTable,
    query_pos_BQ2: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> Tensor:
    """out_BQHD, contiguous, without autograd. Arguments as for the package's function, which checks them.

    Values, offsets and logits are read in place if they have a `row_stride`, and copied otherwise.
    """
    assert table.packed_BT4 is not None
    value_BNHD, value_stride = in_rows(value_BNHD)
    offset_BQHS2, offset_stride = in_rows(offset_BQHS2)
    logit_BQHS, logit_stride = in_rows(logit_BQHS)
    batch, tokens, heads, width = value_BNHD.shape
    queries = offset_BQHS2.shape[1]
    out_BQHD = torch.empty(batch, queries, heads, width, dtype=value_BNHD.dtype, device=value_BNHD.device)
    block = launch_config(queries, tokens, width * value_BNHD.element_size()).queries
    _points_fwd_kernel[triton.cdiv(queries, block), heads, batch](
        QUERY_POS=query_pos_BQ2.contiguous(),
        OFFSET=offset_BQHS2,
        LOGIT=logit_BQHS,
        PACKED=table.packed_BT4,
        VALUE=value_BNHD,
        TAU=tau,
        OUT=out_BQHD,
        NQ=queries,
        N=tokens,
        OFFSET_STRIDE=offset_stride,
        LOGIT_STRIDE=logit_stride,
        VALUE_STRIDE=value_stride,
        CANVAS_H=canvas_hw[0],
        CANVAS_W=canvas_hw[1],
        H=heads,
        S=SAMPLES,
        D=width,
        QB=block,
        num_warps=1,
    )
    return out_BQHD


class _PointAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value_BNHD: Tensor,
        offset_BQHS2: Tensor,
        logit_BQHS: Tensor,
        tau: Tensor,
        table: NearestTable,
        query_pos_BQ2: Tensor,
        canvas_hw: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(value_BNHD, offset_BQHS2, logit_BQHS, tau, query_pos_BQ2)
        ctx.table, ctx.canvas_hw = table, canvas_hw
        return forward(value_BNHD, offset_BQHS2, logit_BQHS, table, query_pos_BQ2, tau, canvas_hw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        value_BNHD, offset_BQHS2, logit_BQHS, tau, query_pos_BQ2 = ctx.saved_tensors
        features = value_BNHD, offset_BQHS2, logit_BQHS
        dvalue, doffset, dlogit = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in features)
        dtau = backward(
            dout_BQHD,
            *features,
            ctx.table,
            query_pos_BQ2,
            tau,
            ctx.canvas_hw,
            dvalue_BNHD=dvalue,
            doffset_BQHS2=doffset,
            dlogit_BQHS=dlogit,
        )
        return dvalue, doffset, dlogit, dtau, None, None, None


def point_attention(
    value_BNHD: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    table: NearestTable,
    query_pos_BQ2: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> Tensor:
    """`forward` with gradients."""
    result: Tensor = _PointAttention.apply(value_BNHD, offset_BQHS2, logit_BQHS, tau, table, query_pos_BQ2, canvas_hw)
    return result
