"""Backward of point attention in Triton. Its results have equal bits from run to run, without atomics on floats.

The value gradient is the hard part: a token sums weight * gradient over all samples that read it. These (query,
weight) pairs are called the edges of the token.

1. count: how many samples of an image and head lie in each cell, and the rank of each sample within its cell.
2. block sums and place: cell counts, summed in the order of the inverse table, say where each table entry's edges begin
   in one list ordered by token. The first kernel sums blocks of the table, the second adds the blocks before its own.
3. main: weights and gathered rows again; gradients of offsets, logits and tau; each of the 16 edges of a query goes to
   its place + rank in the list.
4. dvalue: one program sums weight * gradient over the edges of a few tokens.

Steps 1 and 2 need only the inputs of the forward pass.

Exact sums. Ranks come from integer atomics, so the order of a token's edges differs from run to run, and a sum of
floats would differ in its last bits. Whole numbers do not have this problem. Each product weight * gradient is rounded
to a multiple of a small step, the multiples are added as integers, and the total is multiplied by the step. The step is
a power of two that depends on the largest gradient of the image and head: with |gradient| < X = 2^scale and weights
<= 1, every product is below X.
- fp32 values: step = X * 2^-38, summed in int64. An edge is query << 32 | the weight's bits.
- 16-bit values: step = X * 2^-22, summed in int32, which holds 2^9 such products; the step doubles with every doubling
  of the longest list L of the program beyond that. L = 8192 leaves 17 bits, the utmost 2^18 leave 12. An edge is
  query << 16 | weight * 65535, which drops weights below 2^-17. The rounding costs one addition: `magic` = 1.5 * 2^23
  steps is a float whose last bit is worth one step, so adding it rounds the product to whole steps, and the bits of
  the sum minus the bits of `magic`, taken as integers, are their number.
Nothing overflows however many samples fall on one token. A number that is not finite anywhere in an image and head
makes all of their value gradient NaN.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples, T canvas cells, E = 4 * T table entries,
L = Q * S * 4 edges of an image and head, P programs, R = S * 4 rows that a query and head reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.point_attention import NearestTable
from affmae_kernels.point_attention.triton_sample import (
    OWNERS_FIRST,
    ROWS,
    SAMPLES,
    LaunchConfig,
    cell_of,
    gather,
    in_rows,
    launch_config,
    owners,
    positive,
    program,
    row_stride,
    sample,
)
from affmae_kernels.point_attention.triton_table import FIRST_OF_TOKEN

INFINITE = tl.constexpr(0x7F800000)
"""Bits of fp32 infinity; those of NaN are larger."""
MANTISSA_BITS = tl.constexpr(23)
EXPONENT_BIAS = tl.constexpr(127)
SMALLEST_SCALE = tl.constexpr(-86)
LARGEST_SCALE = tl.constexpr(116)
"""Scales for which all powers of two below are normal fp32 numbers; gradients of 2^116 and more count as infinite."""
STEP_BITS = tl.constexpr(22)
"""A step of int32 sums is 2^-22 of the largest product, as long as lists have less than 2^9 edges."""
LIST_BITS = tl.constexpr(9)
WIDE_STEP_BITS = tl.constexpr(38)
"""The same of int64 sums; enough for any list."""
WEIGHT_ONE = tl.constexpr(65535.0)
"""The weight 1 in 16 bits."""

_COUNT_BLOCK = 512
_PLACE_BLOCK = 1024
_DTAU_BLOCK = 256


@triton.jit(do_not_specialize=["NQ", "OFFSET_STRIDE", "CANVAS_H", "CANVAS_W"])
def _points_bwd_count_kernel(
    QUERY_POS,
    OFFSET,
    COUNT,
    RANK,
    NQ,
    OFFSET_STRIDE,
    CANVAS_H,
    CANVAS_W,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ranks of BLOCK samples of one image."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (query, head, sample)
    live = i < NQ * H * S
    q = i // (H * S)
    h = (i // S) % H
    # [BLOCK] positions of the queries and offsets
    position = QUERY_POS + b * NQ * 2 + q * 2
    offset = OFFSET + b * NQ * OFFSET_STRIDE + q * OFFSET_STRIDE + (i % (H * S)) * 2
    x = tl.load(position, mask=live, other=0).to(tl.float32) + tl.load(offset, mask=live, other=0.0).to(tl.float32)
    y = tl.load(position + 1, mask=live, other=0).to(tl.float32)
    y += tl.load(offset + 1, mask=live, other=0.0).to(tl.float32)
    cell = cell_of(x, y, CANVAS_H, CANVAS_W)
    counter = COUNT + (b * H + h) * (CANVAS_H * CANVAS_W) + cell
    rank = tl.atomic_add(counter, 1, mask=live, sem="relaxed")
    tl.store(RANK + b * NQ * (H * S) + i, rank, mask=live)


@triton.jit
def _entry_counts(COUNT, ENTRY, bh, b, T, BLOCK: tl.constexpr):
    """Edges of the BLOCK table entries of this program, and the entries themselves as in `NearestTable`."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    entry = tl.load(ENTRY + b * (T * 4) + j, mask=j < T * 4, other=-1)
    cell = (entry & (FIRST_OF_TOKEN - 1)) // 4
    count = tl.load(COUNT + bh * T + cell, mask=entry >= 0, other=0)
    return count, entry


@triton.jit(do_not_specialize=["T"])
def _points_bwd_block_sums_kernel(COUNT, ENTRY, SUM, T, H: tl.constexpr, BLOCK: tl.constexpr):
    """One program: edges of BLOCK entries of the inverse table, for one head of one image."""
    block, h, b = program()
    bh = b * H + h
    count, _ = _entry_counts(COUNT, ENTRY, bh, b, T, BLOCK)
    tl.store(SUM + bh * tl.num_programs(0) + block, tl.sum(count, 0))


@triton.jit(do_not_specialize=["T", "N"])
def _points_bwd_place_kernel(
    COUNT, ENTRY, PACKED, SUM, PLACE, BEGIN, T, N, H: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """One program: where the edges of BLOCK entries begin, and those of the tokens whose first entry is among them.
    BLOCKS is a power of two that holds all blocks."""
    block, h, b = program()
    bh = b * H + h
    blocks = tl.num_programs(0)
    count, entry = _entry_counts(COUNT, ENTRY, bh, b, T, BLOCK)
    # [BLOCKS] sums of the blocks before this one
    i = tl.arange(0, BLOCKS)
    before = tl.sum(tl.load(SUM + bh * blocks + i, mask=i < block, other=0), 0)
    place = before + tl.cumsum(count, 0) - count
    first = entry >= FIRST_OF_TOKEN
    real = entry >= 0
    entry = entry & (FIRST_OF_TOKEN - 1)
    tl.store(PLACE + bh * (T * 4) + entry, place, mask=real)
    # [BLOCK] the tokens that entries name
    token = (tl.load(PACKED + b * (T * 4) + entry, mask=first, other=0) >> 16) & 0xFFFF
    tl.store(BEGIN + bh * (N + 1) + token, place, mask=first)
    if block == blocks - 1:
        tl.store(BEGIN + bh * (N + 1) + N, before + tl.sum(count, 0))


@triton.jit
def _edge(q, weight, WIDE: tl.constexpr):
    """A query's number and its weight in one integer; the weight of a NaN is 0, for its bits would reach the number."""
    weight = tl.where(weight == weight, weight, 0.0)
    if WIDE:
        edge = (q.to(tl.int64) << 32) | weight.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        edge = (q << 16) | (weight * WEIGHT_ONE + 0.5).to(tl.int32)
    return edge


@triton.jit(
    do_not_specialize=[
        "NQ",
        "N",
        "OFFSET_STRIDE",
        "LOGIT_STRIDE",
        "DOFFSET_STRIDE",
        "DLOGIT_STRIDE",
        "CANVAS_H",
        "CANVAS_W",
    ]
)
def _points_bwd_main_kernel(
    QUERY_POS,
    OFFSET,
    LOGIT,
    PACKED,
    VALUE,
    TAU,
    DOUT,
    RANK,
    PLACE,
    DOFFSET,
    DLOGIT,
    DTAU_PART,
    TOP,
    EDGE,
    SCRATCH,
    NQ,
    N,
    OFFSET_STRIDE,
    LOGIT_STRIDE,
    VALUE_STRIDE,
    DOFFSET_STRIDE,
    DLOGIT_STRIDE,
    CANVAS_H,
    CANVAS_W,
    H: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    QB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: QB queries of one head of one image.

    With g the gradient times the value of a row, y_s = sum_k near_sk g_sk and m the softmax of the logits:
    dlogit_s = m_s (y_s - sum m y);  d(-tau * distance_sk) = m_s near_sk (g_sk - y_s).
    """
    tile, h, b = program()
    bh = b * H + h
    this = bh * tl.num_programs(0) + tile
    raw_tau = tl.load(TAU).to(tl.float32)
    tau = positive(raw_tau)
    q = tile * QB + tl.arange(0, QB)
    live = q < NQ
    # [QB, D] gradients of the result
    at = b * NQ * (H * D) + h * D + (q * (H * D))[:, None] + tl.arange(0, D)[None, :]
    dout = tl.load(DOUT + at, mask=live[:, None], other=0.0).to(tl.float32)
    # Weights and values as in the forward pass.
    q = tl.minimum(q, NQ - 1)
    mix, near, distance, along_x, along_y, packed, cell = sample(
        QUERY_POS, OFFSET, LOGIT, PACKED, tau, b, h, q, NQ, OFFSET_STRIDE, LOGIT_STRIDE, CANVAS_H, CANVAS_W, S
    )
    value = gather(VALUE, packed, b, h, N, VALUE_STRIDE, S, D, QB)
    # The sum over D leaves each number in several lanes, and all that follows would be computed as often. Through
    # memory it comes back with one number a lane (H200: 179 us instead of 250).
    r = tl.arange(0, S * 4)[:, None] * QB
    column = tl.arange(0, QB)
    mine = SCRATCH + this * (S * 4 * QB)
    if OWNERS_FIRST:
        tl.store(mine + tl.trans(r) + column[:, None], tl.sum(value * dout[:, None, :], 2))
    else:
        tl.store(mine + r + column[None, :], tl.sum(value * dout[None, :, :], 2))
    tl.debug_barrier()
    # [S, 4, QB]
    k = tl.arange(0, 4)[None, :, None]
    s = tl.arange(0, S)
    g = tl.load(mine + (s[:, None, None] * 4 + k) * QB + column[None, None, :])
    # Gradients of the logits, [S, QB]
    y = tl.sum(near * g, 1)
    dlogit = mix * (y - tl.sum(mix * y, 0)[None, :])
    to = DLOGIT + b * NQ * DLOGIT_STRIDE + h * S + q[None, :] * DLOGIT_STRIDE + s[:, None]
    tl.store(to, dlogit.to(DLOGIT.dtype.element_ty), mask=live[None, :])
    # Gradients of the offsets, [S, QB] for x and y
    weight = near * mix[:, None, :]
    dcloseness = weight * (g - y[:, None, :])
    ddistance = -tau * dcloseness
    to = DOFFSET + b * NQ * DOFFSET_STRIDE + h * (S * 2) + q[None, :] * DOFFSET_STRIDE + s[:, None] * 2
    tl.store(to, tl.sum(ddistance * along_x, 1).to(DOFFSET.dtype.element_ty), mask=live[None, :])
    tl.store(to + 1, tl.sum(ddistance * along_y, 1).to(DOFFSET.dtype.element_ty), mask=live[None, :])
    # Gradient of tau. Repeated queries beyond the last add nothing: their gradients were read as 0.
    dtau = -tl.sum(tl.sum(tl.sum(dcloseness * distance, 2), 1), 0)
    tl.store(DTAU_PART + this, tl.where(raw_tau <= 0, 0.0, dtau))
    # Largest gradient. Bits of floats >= 0 order like integers, and unlike a maximum of floats this one keeps NaN. A
    # weight that is NaN shows in dtau.
    top = tl.max(tl.max(tl.abs(dout).to(tl.int32, bitcast=True), 1), 0)
    tl.atomic_max(TOP + bh, tl.where(dtau == dtau, top, INFINITE), sem="relaxed")
    # Edges. [S, QB] ranks, [S, 4, QB] places
    rank = tl.load(RANK + b * NQ * (H * S) + h * S + q[None, :] * (H * S) + s[:, None])
    real = (packed != -1) & live[None, None, :]
    place = tl.load(PLACE + bh * (CANVAS_H * CANVAS_W * 4) + cell[:, None, :] * 4 + k, mask=real, other=0)
    to = EDGE + bh * (NQ * S * 4) + place + rank[:, None, :]
    tl.store(to, _edge(q[None, None, :], weight, WIDE), mask=real)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, for exponents of -126 to 127."""
    return ((exponent + EXPONENT_BIAS) << MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _ceil_log2(number):
    """The exponent of the smallest power of two above an fp32 number; -126 for 0."""
    return ((number.to(tl.int32, bitcast=True) >> MANTISSA_BITS) & 255) - (EXPONENT_BIAS - 1)


@triton.jit
def _products(DOUT, EDGE, at, inside, NQ, H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """weight * gradient of the edges at `at` [rows, owners], for pointers to the image and head; [rows, owners, D]."""
    edge = tl.load(EDGE + at, mask=inside, other=0)
    if WIDE:
        q = (edge >> 32).to(tl.int32)
        weight = edge.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        q = (edge >> 16) & 0xFFFF
        weight = (edge & 0xFFFF).to(tl.float32) * (1.0 / WEIGHT_ONE)
    element = (q * (H * D))[:, :, None] + tl.arange(0, D)[None, None, :]
    return tl.load(DOUT + element, mask=inside[:, :, None], other=0.0).to(tl.float32) * weight[:, :, None]


@triton.jit(do_not_specialize=["NQ", "N", "PARTS"])
def _points_bwd_dvalue_kernel(
    DOUT,
    EDGE,
    BEGIN,
    TOP,
    DTAU_PART,
    DVALUE,
    DTAU,
    NQ,
    N,
    PARTS,
    DVALUE_STRIDE,
    H: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    TB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    DTAU_BLOCK: tl.constexpr,
):
    """One program: the gradient of TB tokens of one head of one image, R edges of each at a time.

    The very first program also sums the PARTS of the gradient of tau, which saves a launch.
    """
    tile, h, b = program()
    bh = b * H + h
    if (tile == 0) & (bh == 0):
        part = tl.arange(0, DTAU_BLOCK)
        sums = tl.zeros([DTAU_BLOCK], tl.float32)
        full = PARTS // DTAU_BLOCK * DTAU_BLOCK
        for p in range(0, full, DTAU_BLOCK):
            sums += tl.load(DTAU_PART + p + part)
        sums += tl.load(DTAU_PART + full + part, mask=full + part < PARTS, other=0.0)
        tl.store(DTAU, tl.sum(sums, 0).to(DTAU.dtype.element_ty))
    # [TB] ends of the tokens' lists
    n = tile * TB + tl.arange(0, TB)
    live = n < N
    begin = tl.load(BEGIN + bh * (N + 1) + n, mask=live, other=0)
    end = tl.load(BEGIN + bh * (N + 1) + n + 1, mask=live, other=0)
    longest = tl.max(end - begin, 0)
    # The step of the exact sum (see the module).
    top = tl.load(TOP + bh).to(tl.float32, bitcast=True)
    raw_scale = _ceil_log2(top)
    scale = tl.minimum(tl.maximum(raw_scale, SMALLEST_SCALE), LARGEST_SCALE)
    if WIDE:
        step_exponent = scale - WIDE_STEP_BITS
    else:
        step_exponent = scale - STEP_BITS + tl.maximum(_ceil_log2(longest.to(tl.float32)) - LIST_BITS, 0)
    steps_per_unit = _power_of_two(-step_exponent)
    magic = 1.5 * _power_of_two(step_exponent + MANTISSA_BITS)
    # Sum of the lists, in steps.
    dout = DOUT + b * NQ * (H * D) + h * D
    edges = EDGE + bh * (NQ * S * 4)
    j = tl.arange(0, R)[:, None]
    total = tl.zeros([TB, D], tl.int64 if WIDE else tl.int32)
    for i in range(0, longest, R):
        at = owners(begin[None, :] + i + j)
        inside = owners((begin[None, :] + i + j) < end[None, :])
        product = _products(dout, edges, at, inside, NQ, H, D, WIDE)
        if WIDE:
            steps = (product * steps_per_unit).to(tl.int64)
        else:
            steps = (product + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
        total += tl.sum(steps, ROWS)
    # [TB, D]
    dvalue = tl.where(raw_scale > LARGEST_SCALE, float("nan"), total.to(tl.float32) * _power_of_two(step_exponent))
    to = DVALUE + b * N * DVALUE_STRIDE + h * D + (n * DVALUE_STRIDE)[:, None] + tl.arange(0, D)[None, :]
    tl.store(to, dvalue.to(DVALUE.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True)
class EdgeLists:
    """Where the edges of each image and head go: a list of L places, in the order of the tokens."""

    rank_BQHS: Tensor
    """int32: rank of a sample among those of its cell."""
    place_BHE: Tensor
    """int32: first place of a table entry's edges."""
    begin_BHN: Tensor
    """int32: first place of a token's edges, and behind the last token the number of edges; flat, N + 1 each."""
    top_BH: Tensor
    """int32 zeros: room for the bits of the largest gradient; flat."""


def edge_lists(
    offset_BQHS2: Tensor, table: NearestTable, query_pos_BQ2: Tensor, tokens: int, canvas_hw: tuple[int, int]
) -> EdgeLists:
    """Steps 1 and 2; arguments as for `backward`."""
    assert table.packed_BT4 is not None and table.entry_BE is not None
    offset_BQHS2, offset_stride = in_rows(offset_BQHS2)
    batch, queries, heads = offset_BQHS2.shape[:3]
    cells = canvas_hw[0] * canvas_hw[1]
    ints = table.packed_BT4
    # One launch sets all counters to 0; each begins at a multiple of 16 bytes. `begin` is among them so that tokens
    # without entries, which positions that are not distinct would leave, do not lead out of the lists.
    sizes = [-(-size // 4) * 4 for size in (batch * heads * cells, batch * heads * (tokens + 1), batch * heads)]
    count_BHT, begin_BHN, top_BH = ints.new_zeros(sum(sizes)).split(sizes)
    rank_BQHS = ints.new_empty(batch, queries, heads, SAMPLES)
    _points_bwd_count_kernel[triton.cdiv(queries * heads * SAMPLES, _COUNT_BLOCK), batch](
        QUERY_POS=query_pos_BQ2.contiguous(),
        OFFSET=offset_BQHS2,
        COUNT=count_BHT,
        RANK=rank_BQHS,
        NQ=queries,
        OFFSET_STRIDE=offset_stride,
        CANVAS_H=canvas_hw[0],
        CANVAS_W=canvas_hw[1],
        H=heads,
        S=SAMPLES,
        BLOCK=_COUNT_BLOCK,
        num_warps=4,
    )
    blocks = triton.cdiv(cells * 4, _PLACE_BLOCK)
    sum_BHP = ints.new_empty(batch, heads, blocks)
    _points_bwd_block_sums_kernel[blocks, heads, batch](
        COUNT=count_BHT,
        ENTRY=table.entry_BE,
        SUM=sum_BHP,
        T=cells,
        H=heads,
        BLOCK=_PLACE_BLOCK,
        num_warps=4,
    )
    place_BHE = ints.new_empty(batch, heads, cells * 4)
    _points_bwd_place_kernel[blocks, heads, batch](
        COUNT=count_BHT,
        ENTRY=table.entry_BE,
        PACKED=table.packed_BT4,
        SUM=sum_BHP,
        PLACE=place_BHE,
        BEGIN=begin_BHN,
        T=cells,
        N=tokens,
        H=heads,
        BLOCK=_PLACE_BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=4,
    )
    return EdgeLists(rank_BQHS, place_BHE, begin_BHN, top_BH)


def sum_edges(
    dout_BQHD: Tensor,
    edge_BHL: Tensor,
    lists: EdgeLists,
    dtau_P: Tensor,
    config: LaunchConfig,
    *,
    dvalue_BNHD: Tensor,
    dtau: Tensor,
) -> None:
    """Step 4: writes the gradient of the values, and that of tau as the sum of `dtau_P`."""
    batch, tokens, heads, width = dvalue_BNHD.shape
    _points_bwd_dvalue_kernel[triton.cdiv(tokens, config.tokens), heads, batch](
        DOUT=dout_BQHD,
        EDGE=edge_BHL,
        BEGIN=lists.begin_BHN,
        TOP=lists.top_BH,
        DTAU_PART=dtau_P,
        DVALUE=dvalue_BNHD,
        DTAU=dtau,
        NQ=dout_BQHD.shape[1],
        N=tokens,
        PARTS=dtau_P.numel(),
        DVALUE_STRIDE=_output_stride("dvalue_BNHD", dvalue_BNHD),
        H=heads,
        S=SAMPLES,
        D=width,
        TB=config.tokens,
        R=config.edges,
        WIDE=edge_BHL.dtype == torch.int64,
        DTAU_BLOCK=_DTAU_BLOCK,
        num_warps=1,
    )


def backward(
    dout_BQHD: Tensor,
    value_BNHD: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    table: NearestTable,
    query_pos_BQ2: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
    *,
    dvalue_BNHD: Tensor,
    doffset_BQHS2: Tensor,
    dlogit_BQHS: Tensor,
) -> Tensor:
    """Writes the gradients of values, offsets and logits into the given tensors, each in its dtype.

    Args:
        dout_BQHD: gradient of the result.
        value_BNHD, offset_BQHS2, logit_BQHS, table, query_pos_BQ2, tau, canvas_hw: what `forward` was given.
        dvalue_BNHD, doffset_BQHS2, dlogit_BQHS: may be slices of one wider matrix.

    Returns:
        Gradient of tau, in its shape and dtype.

    Raises:
        ValueError: when a tensor for a gradient has no `row_stride`.
    """
    dout_BQHD, query_pos_BQ2 = dout_BQHD.contiguous(), query_pos_BQ2.contiguous()
    value_BNHD, value_stride = in_rows(value_BNHD)
    offset_BQHS2, offset_stride = in_rows(offset_BQHS2)
    logit_BQHS, logit_stride = in_rows(logit_BQHS)
    batch, tokens, heads, width = value_BNHD.shape
    queries = offset_BQHS2.shape[1]
    wide = value_BNHD.dtype == torch.float32
    config = launch_config(queries, tokens, width * value_BNHD.element_size())
    block = config.backward_queries
    tiles = triton.cdiv(queries, block)
    programs = batch * heads * tiles
    device = value_BNHD.device
    # Steps 1 and 2: where edges go.
    lists = edge_lists(offset_BQHS2, table, query_pos_BQ2, tokens, canvas_hw)
    # Step 3: edges, and all gradients but that of the values.
    edge_BHL = torch.empty(
        batch, heads, queries * SAMPLES * 4, dtype=torch.int64 if wide else torch.int32, device=device
    )
    dtau_P = torch.empty(programs, dtype=torch.float32, device=device)
    scratch_PR = torch.empty(programs, SAMPLES * 4 * block, dtype=torch.float32, device=device)
    _points_bwd_main_kernel[tiles, heads, batch](
        QUERY_POS=query_pos_BQ2,
        OFFSET=offset_BQHS2,
        LOGIT=logit_BQHS,
        PACKED=table.packed_BT4,
        VALUE=value_BNHD,
        TAU=tau,
        DOUT=dout_BQHD,
        RANK=lists.rank_BQHS,
        PLACE=lists.place_BHE,
        DOFFSET=doffset_BQHS2,
        DLOGIT=dlogit_BQHS,
        DTAU_PART=dtau_P,
        TOP=lists.top_BH,
        EDGE=edge_BHL,
        SCRATCH=scratch_PR,
        NQ=queries,
        N=tokens,
        OFFSET_STRIDE=offset_stride,
        LOGIT_STRIDE=logit_stride,
        VALUE_STRIDE=value_stride,
        DOFFSET_STRIDE=_output_stride("doffset_BQHS2", doffset_BQHS2),
        DLOGIT_STRIDE=_output_stride("dlogit_BQHS", dlogit_BQHS),
        CANVAS_H=canvas_hw[0],
        CANVAS_W=canvas_hw[1],
        H=heads,
        S=SAMPLES,
        D=width,
        QB=block,
        WIDE=wide,
        num_warps=2,
    )
    # Step 4: the gradient of the values.
    dtau = torch.empty_like(tau)
    sum_edges(dout_BQHD, edge_BHL, lists, dtau_P, config, dvalue_BNHD=dvalue_BNHD, dtau=dtau)
    return dtau


def _output_stride(name: str, tensor: Tensor) -> int:
    stride = row_stride(tensor)
    if stride is None:
        raise ValueError(f"{name} must have dense rows at equal distances; got strides {tensor.stride()}")
    return stride
