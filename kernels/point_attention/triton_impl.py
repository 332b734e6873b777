"""Point attention in Triton: everything between the projections in one forward kernel.

Forward, per query and head: 4 samples look up the packed nearest tokens of their cells, weigh them by
softmax(-relu(tau) * distance), mix the samples by softmax(logits), and gather 16 rows of values. Nothing is saved but
the inputs; the backward (`triton_backward`) computes the weights anew. No result depends on the order in which
programs run.

Axes: B batch, N tokens, A heads, D head width, Q queries, S samples, T canvas cells, E = 4 * T table entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.point_attention import triton_backward
from affmae_kernels.point_attention.triton_sample import (
    ROWS,
    SAMPLES,
    gathered_rows,
    launch_config,
    owners,
    positive,
    sample,
    split_program,
)
from affmae_kernels.point_attention.triton_values import Problem


@triton.jit(do_not_specialize=["NQ", "N", "TILES", "W", "H"])
def _points_forward_kernel(
    QUERY_POS,
    OFFSET,
    LOGIT,
    PACKED,
    VALUE,
    TAU,
    OUT,
    NQ,
    N,
    TILES,
    W,
    H,
    A: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    QB: tl.constexpr,
):
    """One program: QB queries of one head."""
    b, a, tile = split_program(TILES, A)
    tau = positive(tl.load(TAU).to(tl.float32))
    q = tile * QB + tl.arange(0, QB)
    live = q < NQ
    q = tl.minimum(q, NQ - 1)
    mix, near, _, _, _, packed, _, _ = sample(QUERY_POS, OFFSET, LOGIT, PACKED, tau, b, a, q, NQ, W, H, A, S)
    weight = owners(tl.reshape(near * mix[:, None, :], [S * 4, QB]))
    row = gathered_rows(packed, b, a, N, A, S, QB)
    d = tl.arange(0, D)
    value = tl.load(VALUE + row[:, :, None] * D + d[None, None, :]).to(tl.float32)
    out = tl.sum(value * weight[:, :, None], ROWS)  # [QB, D]
    at = ((b * NQ + q) * A + a) * D
    tl.store(OUT + at[:, None] + d[None, :], out.to(OUT.dtype.element_ty), mask=live[:, None])


@torch.library.custom_op("affmae::point_attention", mutates_args=())
def point_attention(
    value_BNAD: Tensor,
    packed_BT4: Tensor,
    entry_BE: Tensor,
    first_BN: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """See the package; the tables are those of `triton_table.nearest_table`, of which the inverse is for gradients."""
    value_BNAD, query_pos_BQ2 = value_BNAD.contiguous(), query_pos_BQ2.contiguous()
    offset_BQAS2, logit_BQAS = offset_BQAS2.contiguous(), logit_BQAS.contiguous()
    batch, tokens, heads, head_width = value_BNAD.shape
    queries = offset_BQAS2.shape[1]
    out_BQAD = value_BNAD.new_empty(batch, queries, heads, head_width)
    block = launch_config(queries, tokens, head_width * value_BNAD.element_size()).queries
    tiles = triton.cdiv(queries, block)
    _points_forward_kernel[(batch * heads * tiles,)](
        query_pos_BQ2,
        offset_BQAS2,
        logit_BQAS,
        packed_BT4,
        value_BNAD,
        tau,
        out_BQAD,
        queries,
        tokens,
        tiles,
        width,
        height,
        A=heads,
        S=SAMPLES,
        D=head_width,
        QB=block,
        num_warps=1,
    )
    return out_BQAD


@point_attention.register_fake
def _(value_BNAD: Tensor, packed_BT4, entry_BE, first_BN, query_pos_BQ2, offset_BQAS2: Tensor, *rest: Any) -> Tensor:
    batch, _, heads, head_width = value_BNAD.shape
    return value_BNAD.new_empty(batch, offset_BQAS2.shape[1], heads, head_width)


@torch.library.custom_op("affmae::point_attention_backward", mutates_args=())
def point_attention_backward(
    grad_BQAD: Tensor,
    value_BNAD: Tensor,
    packed_BT4: Tensor,
    entry_BE: Tensor,
    first_BN: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, offsets, logits and tau, each in its own dtype."""
    problem = Problem(
        grad_BQAD.contiguous(),
        value_BNAD.contiguous(),
        packed_BT4,
        entry_BE,
        first_BN,
        query_pos_BQ2.contiguous(),
        offset_BQAS2.contiguous(),
        logit_BQAS.contiguous(),
        tau,
        height,
        width,
    )
    return triton_backward.gradients(problem)


@point_attention_backward.register_fake
def _(
    grad_BQAD, value_BNAD, packed_BT4, entry_BE, first_BN, query_pos_BQ2, offset_BQAS2, logit_BQAS, tau, height, width
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, offset, logit, tau = (x.new_empty(x.shape) for x in (value_BNAD, offset_BQAS2, logit_BQAS, tau))
    return value, offset, logit, tau


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_BQAD: Tensor) -> tuple[Tensor | None, ...]:
    value, offset, logit, tau = point_attention_backward(grad_BQAD, *ctx.saved_tensors, ctx.height, ctx.width)
    return value, None, None, None, None, offset, logit, tau, None, None


point_attention.register_autograd(_backward, setup_context=_setup_context)
