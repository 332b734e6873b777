"""The last step of point attention's backward: the gradient of the values, from lists of references by token.

The references and the grid on which products are summed are those of `triton_backward`, whose axes these are. TB tokens
of a program, R references of each at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.point_attention.triton_sample import ROWS, SAMPLES, LaunchConfig, owners, split_program

LARGEST = tl.constexpr(242)
"""Exponent up to which every grid can be formed; gradients of 2^116 and more count as infinite."""


@dataclass(frozen=True)
class Problem:
    """Contiguous inputs of the backward."""

    grad_BQAD: Tensor
    value_BNAD: Tensor
    packed_BT4: Tensor
    entry_BE: Tensor
    first_BN: Tensor
    query_pos_BQ2: Tensor
    offset_BQAS2: Tensor
    logit_BQAS: Tensor
    tau: Tensor
    height: int
    width: int


@triton.jit
def _products(GRAD, REFERENCE, at, inside, b, a, NQ, A: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """weight * gradient of the references at `at` [R, TB]; [R, TB, D], rows and owners in the order of `owners`."""
    reference = tl.load(REFERENCE + at, mask=inside, other=0)
    if WIDE:
        q = (reference >> 32).to(tl.int32)
        weight = reference.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        q = (reference >> 16) & 0xFFFF
        weight = (reference & 0xFFFF).to(tl.float32) * (1.0 / 65535.0)
    element = (((b * NQ + q) * A + a) * D)[:, :, None] + tl.arange(0, D)[None, None, :]
    return tl.load(GRAD + element, mask=inside[:, :, None], other=0.0).to(tl.float32) * weight[:, :, None]


@triton.jit
def _power(exponent):
    """2^(exponent - 127), for exponents of 1 to 254."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["NQ", "N", "TILES"])
def _points_values_kernel(
    GRAD,
    REFERENCE,
    BEGIN,
    TOP,
    DVALUE,
    NQ,
    N,
    TILES,
    A: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    TB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the gradient of TB tokens of one head, R references of each at a time."""
    b, a, tile = split_program(TILES, A)
    ba = b * A + a
    n = tile * TB + tl.arange(0, TB)
    live = n < N
    begin = tl.load(BEGIN + ba * (N + 1) + n, mask=live, other=0)
    end = tl.load(BEGIN + ba * (N + 1) + n + 1, mask=live, other=0)
    longest = tl.max(end - begin, 0)
    j = tl.arange(0, R)[:, None]
    raw_exponent = (tl.load(TOP + ba) >> 23) & 255
    exponent = tl.minimum(tl.maximum(raw_exponent, 40), LARGEST)
    length_bits = (longest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # longest < 2^length_bits
    coarser = tl.maximum(length_bits - 9, 0)
    to_wide_grid = _power(291 - exponent)  # 2^38 / X
    magic = 1.5 * _power(exponent + 2 + coarser)  # adding it rounds to the grid: the sum's exponent is that of magic
    zero = magic.to(tl.int32, bitcast=True)
    lists = REFERENCE + ba * (NQ * S * 4)
    total = tl.zeros([TB, D], tl.int64 if WIDE else tl.int32)
    for i in range(0, longest, R):
        at = owners(begin[None, :] + i + j)
        inside = owners((begin[None, :] + i + j) < end[None, :])
        product = _products(GRAD, lists, at, inside, b, a, NQ, A, D, WIDE)
        if WIDE:
            total += tl.sum((product * to_wide_grid).to(tl.int64), ROWS)
        else:
            total += tl.sum((product + magic).to(tl.int32, bitcast=True) - zero, ROWS)
    grid = _power(exponent - 37) if WIDE else _power(exponent - 21 + coarser)
    out = tl.where(raw_exponent > LARGEST, float("nan"), total.to(tl.float32) * grid)
    at = ((b * N + n) * A + a) * D
    tl.store(DVALUE + at[:, None] + tl.arange(0, D)[None, :], out.to(DVALUE.dtype.element_ty), mask=live[:, None])


def gradient_of_values(
    problem: Problem, config: LaunchConfig, reference_BAR: Tensor, begin_BAN: Tensor, top_BA: Tensor
) -> Tensor:
    """Gradient of the values."""
    batch, tokens, heads, head_width = problem.value_BNAD.shape
    dvalue_BNAD = torch.empty_like(problem.value_BNAD)
    tiles = triton.cdiv(tokens, config.tokens)
    _points_values_kernel[(batch * heads * tiles,)](
        problem.grad_BQAD,
        reference_BAR,
        begin_BAN,
        top_BA,
        dvalue_BNAD,
        problem.offset_BQAS2.shape[1],
        tokens,
        tiles,
        A=heads,
        S=SAMPLES,
        D=head_width,
        TB=config.tokens,
        R=config.entries,
        WIDE=reference_BAR.dtype == torch.int64,
        num_warps=1,
    )
    return dvalue_BNAD
