"""Backward of point attention in Triton, repeatable to the bit and without atomics on floats.

1. count: every sample takes a rank among those of its image, head and cell.
2. place: the counts, summed in the order of the inverse table, give where the references of an entry start in lists by
   token.
3. main: weights and gathered rows anew; gradients of offsets, logits and tau; each of the 16 weights of a query goes
   with the query's number, as one reference, to its place + rank.
4. values (`triton_values`): one program owns a few tokens and sums weight * gradient over their lists.

Ranks come from integer atomics, so the order inside a list differs from run to run; the sum must not. Products are
rounded to a grid set by the largest gradient of the image and head, and added as integers. With
|gradient| < X = 2^(exponent - 126), weights <= 1 and L the longest list of a program:
- 16-bit values: a reference is query << 16 | weight * 65535, which drops weights below 2^-17. A product has 22 bits and
  a sign where L < 512, and one bit less for every doubling of L, so that L of them fit int32. L = 8192 leaves 17 bits,
  the utmost 2^18 leave 12.
- fp32 values: a reference is query << 32 | the weight's bits. A product has 38 bits and a sign, summed in int64.
Nothing overflows however many samples pile up on one token. A number that is not finite anywhere in an image and head
makes all of their values' gradient NaN.

Axes: B batch, N tokens, A heads, D head width, Q queries, S samples, T canvas cells, E = 4 * T table entries,
R = S * 4 rows that a query and head reads, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.point_attention.triton_sample import (
    OWNERS_FIRST,
    SAMPLES,
    LaunchConfig,
    cell_of,
    gathered_rows,
    launch_config,
    positive,
    sample,
    split_program,
)
from affmae_kernels.point_attention.triton_values import Problem, gradient_of_values

INFINITE = tl.constexpr(0x7F800000)
"""Bits of fp32 infinity; those of NaN are larger."""
_COUNT_BLOCK = 512
_PLACE_BLOCK = 4096


@triton.jit(do_not_specialize=["NQ", "W", "H"])
def _points_count_kernel(
    QUERY_POS, OFFSET, COUNT, RANK, NQ, W, H, A: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: ranks of BLOCK samples of one image."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (query, head, sample)
    live = i < NQ * A * S
    row = b * NQ + i // (A * S)
    a = (i // S) % A
    element = b * NQ * A * S + i
    x = tl.load(QUERY_POS + row * 2, mask=live, other=0).to(tl.float32)
    y = tl.load(QUERY_POS + row * 2 + 1, mask=live, other=0).to(tl.float32)
    x += tl.load(OFFSET + element * 2, mask=live, other=0.0).to(tl.float32)
    y += tl.load(OFFSET + element * 2 + 1, mask=live, other=0.0).to(tl.float32)
    counter = COUNT + (b * A + a) * (W * H) + cell_of(x, y, W, H)
    tl.store(RANK + element, tl.atomic_add(counter, 1, mask=live, sem="relaxed"), mask=live)


@triton.jit(do_not_specialize=["T", "N"])
def _points_place_kernel(COUNT, ENTRY, FIRST, PLACE, BEGIN, T, N, A: tl.constexpr, BLOCK: tl.constexpr):
    """One program: list positions of all entries of one image and head, and where the lists begin."""
    ba = tl.program_id(0)
    b = ba // A
    filled = 0
    for j0 in range(0, T * 4, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        entry = tl.load(ENTRY + b * T * 4 + j, mask=j < T * 4, other=-1)
        real = entry >= 0
        count = tl.load(COUNT + ba * T + entry // 4, mask=real, other=0)
        tl.store(PLACE + ba * T * 4 + entry, filled + tl.cumsum(count, 0) - count, mask=real)
        filled += tl.sum(count, 0)
    tl.debug_barrier()  # the places are read back
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        first = tl.load(FIRST + b * N + n, mask=n < N, other=0)
        begin = tl.load(PLACE + ba * T * 4 + first, mask=n < N, other=0)
        tl.store(BEGIN + ba * (N + 1) + n, begin, mask=n < N)
    tl.store(BEGIN + ba * (N + 1) + N, filled)


@triton.jit
def _reference(q, weight, WIDE: tl.constexpr):
    """A query's number and its weight in one integer; the weight of a NaN is 0, for its bits would reach the number."""
    weight = tl.where(weight == weight, weight, 0.0)
    if WIDE:
        reference = (q.to(tl.int64) << 32) | weight.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        reference = (q << 16) | (weight * 65535.0 + 0.5).to(tl.int32)
    return reference


@triton.jit(do_not_specialize=["NQ", "N", "TILES", "W", "H"])
def _points_main_kernel(
    QUERY_POS,
    OFFSET,
    LOGIT,
    PACKED,
    VALUE,
    TAU,
    GRAD,
    RANK,
    PLACE,
    DOFFSET,
    DLOGIT,
    DTAU,
    TOP,
    REFERENCE,
    SCRATCH,
    NQ,
    N,
    TILES,
    W,
    H,
    A: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    QB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: QB queries of one head.

    With g the gradient times the value of a row, y_s = sum_k near_sk g_sk and m the softmax of the logits:
    dlogit_s = m_s (y_s - sum m y);  d(-tau * distance_sk) = m_s near_sk (g_sk - y_s).
    """
    b, a, tile = split_program(TILES, A)
    raw_tau = tl.load(TAU).to(tl.float32)
    tau = positive(raw_tau)
    d = tl.arange(0, D)
    q = tile * QB + tl.arange(0, QB)
    live = q < NQ
    at = ((b * NQ + q) * A + a) * D
    grad = tl.load(GRAD + at[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)  # [QB, D]
    q = tl.minimum(q, NQ - 1)
    mix, near, distance, along_x, along_y, packed, element, cell = sample(
        QUERY_POS, OFFSET, LOGIT, PACKED, tau, b, a, q, NQ, W, H, A, S
    )
    row = gathered_rows(packed, b, a, N, A, S, QB)
    value = tl.load(VALUE + row[:, :, None] * D + d[None, None, :]).to(tl.float32)
    r = tl.arange(0, S * 4)[:, None] * QB
    column = tl.arange(0, QB)
    # The sum over D leaves each number in several lanes, and all that follows would be computed as often. Through
    # memory it comes back with one number a lane (H200: 179 us instead of 250).
    mine = SCRATCH + tl.program_id(0) * (S * 4 * QB)
    if OWNERS_FIRST:
        tl.store(mine + tl.trans(r) + column[:, None], tl.sum(value * grad[:, None, :], 2))
    else:
        tl.store(mine + r + column[None, :], tl.sum(value * grad[None, :, :], 2))
    tl.debug_barrier()
    k = tl.arange(0, 4)[None, :, None]
    s = tl.arange(0, S)[:, None, None]
    g = tl.load(mine + (s * 4 + k) * QB + column[None, None, :])  # [S, 4, QB]
    y = tl.sum(near * g, 1)
    dlogit = mix * (y - tl.sum(mix * y, 0)[None, :])
    tl.store(DLOGIT + element, dlogit.to(DLOGIT.dtype.element_ty), mask=live[None, :])
    weight = near * mix[:, None, :]
    dcloseness = weight * (g - y[:, None, :])
    ddistance = -tau * dcloseness
    tl.store(DOFFSET + element * 2, tl.sum(ddistance * along_x, 1).to(DOFFSET.dtype.element_ty), mask=live[None, :])
    tl.store(DOFFSET + element * 2 + 1, tl.sum(ddistance * along_y, 1).to(DOFFSET.dtype.element_ty), mask=live[None, :])
    dtau = -tl.sum(tl.sum(tl.sum(dcloseness * distance, 2), 1), 0)
    tl.store(DTAU + tl.program_id(0), tl.where(raw_tau <= 0, 0.0, dtau))
    # Bits of floats >= 0 order like integers, and unlike a maximum of floats this one keeps NaN. A weight that is NaN
    # shows in dtau.
    top = tl.max(tl.max(tl.abs(grad).to(tl.int32, bitcast=True), 1), 0)
    tl.atomic_max(TOP + b * A + a, tl.where(dtau == dtau, top, INFINITE), sem="relaxed")
    of_head = (b * A + a) * (W * H) + cell
    rank = tl.load(RANK + element)
    real = (packed != -1) & live[None, None, :]
    place = tl.load(PLACE + of_head[:, None, :] * 4 + k, mask=real, other=0) + rank[:, None, :]
    to = REFERENCE + (b * A + a) * (NQ * S * 4) + place
    tl.store(to, _reference(q[None, None, :], weight, WIDE), mask=real)


def gradients(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, offsets, logits and tau, each in its own dtype."""
    batch, tokens, heads, head_width = problem.value_BNAD.shape
    queries, cells = problem.offset_BQAS2.shape[1], problem.height * problem.width
    config = launch_config(queries, tokens, head_width * problem.value_BNAD.element_size())
    ints = problem.packed_BT4
    zero_C = ints.new_zeros(batch * heads * (cells + 1))
    count_BAT, top_BA = zero_C[: batch * heads * cells], zero_C[batch * heads * cells :]
    rank_BQAS = ints.new_empty(batch, queries, heads, SAMPLES)
    _points_count_kernel[(triton.cdiv(queries * heads * SAMPLES, _COUNT_BLOCK), batch)](
        problem.query_pos_BQ2,
        problem.offset_BQAS2,
        count_BAT,
        rank_BQAS,
        queries,
        problem.width,
        problem.height,
        A=heads,
        S=SAMPLES,
        BLOCK=_COUNT_BLOCK,
        num_warps=4,
    )
    place_BAE = ints.new_empty(batch, heads, cells * 4)
    begin_BAN = ints.new_empty(batch, heads, tokens + 1)
    _points_place_kernel[(batch * heads,)](
        count_BAT,
        problem.entry_BE,
        problem.first_BN,
        place_BAE,
        begin_BAN,
        cells,
        tokens,
        A=heads,
        BLOCK=min(_PLACE_BLOCK, triton.next_power_of_2(cells * 4)),
        num_warps=8,
    )
    doffset, dlogit, dtau, reference_BAR = _main(problem, config, rank_BQAS, place_BAE, top_BA)
    return gradient_of_values(problem, config, reference_BAR, begin_BAN, top_BA), doffset, dlogit, dtau


def _main(
    problem: Problem, config: LaunchConfig, rank_BQAS: Tensor, place_BAE: Tensor, top_BA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of offsets, logits and tau, and the references by token; raises `top_BA` to the largest gradients."""
    batch, tokens, heads, head_width = problem.value_BNAD.shape
    queries = problem.offset_BQAS2.shape[1]
    wide = problem.value_BNAD.dtype == torch.float32
    block = config.backward_queries
    tiles = triton.cdiv(queries, block)
    programs = batch * heads * tiles
    new_empty = problem.value_BNAD.new_empty
    doffset_BQAS2, dlogit_BQAS = torch.empty_like(problem.offset_BQAS2), torch.empty_like(problem.logit_BQAS)
    dtau_P = new_empty(programs, dtype=torch.float32)
    scratch_PR = new_empty(programs, SAMPLES * 4 * block, dtype=torch.float32)
    reference_BAR = new_empty(batch, heads, queries * SAMPLES * 4, dtype=torch.int64 if wide else torch.int32)
    _points_main_kernel[(programs,)](
        problem.query_pos_BQ2,
        problem.offset_BQAS2,
        problem.logit_BQAS,
        problem.packed_BT4,
        problem.value_BNAD,
        problem.tau,
        problem.grad_BQAD,
        rank_BQAS,
        place_BAE,
        doffset_BQAS2,
        dlogit_BQAS,
        dtau_P,
        top_BA,
        reference_BAR,
        scratch_PR,
        queries,
        tokens,
        tiles,
        problem.width,
        problem.height,
        A=heads,
        S=SAMPLES,
        D=head_width,
        QB=block,
        WIDE=wide,
        num_warps=2,
    )
    dtau = dtau_P.sum().to(problem.tau.dtype).reshape(problem.tau.shape)
    return doffset_BQAS2, dlogit_BQAS, dtau, reference_BAR
