"""Neighbourhoods on the GPU, equal to the reference bit for bit, without a sort.

A token's place in the order is the number of tokens before it: a running sum over the anchor cells, plus a count among
the few tokens of its own cell. The nearest clusters are the smallest whole-number keys of the reference; they are taken
one after another from a tile in registers. What is unusual: the only atomics hand out slots of a cell, in whatever
order; the count that follows does not depend on it, so every run gives the same result.

Axes: B batch, N tokens, L anchor cells in walk order, S slots of an anchor cell, K clusters, C nearest clusters.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.neighbourhoods.pairs import image_and_part
from affmae_kernels.neighbourhoods.reference import anchor_grid

TOKENS = 128
"""Tokens of one program where each is handled on its own."""
TILE = 2048
"""Keys of one tile of the search for the nearest clusters: 64 registers of 32 bits in each thread of one warp."""
MOST_ROWS = 16
"""Most tokens of a tile: with more of them the running results take too many registers."""


@triton.jit
def _centre(walk, rows, columns, width, height):
    """(x, y) of an anchor cell's centre in units of 1 / (2 rows columns) cells, int64, by its place in the walk."""
    row = walk // columns
    along = walk % columns
    column = tl.where(row % 2 == 0, along, columns - 1 - along)
    x = (2 * column + 1).to(tl.int64) * width * rows - rows * columns
    y = (2 * row + 1).to(tl.int64) * height * columns - rows * columns
    return x, y


@triton.jit(do_not_specialize=["N", "blocks", "rows", "columns", "width", "height", "slots", "epsilon_bits"])
def _cell_kernel(
    POS, WALK, RATIO, COUNT, CELL_RATIO, CELL_CANVAS,
    N, blocks, rows, columns, width, height, slots, epsilon_bits,
    ONE_CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens. Anchor cell, |p - prev|^2 / (|p - next|^2 + epsilon) and a slot of the cell for each.

    Distances are whole numbers and the division is IEEE float64; positive doubles order like their bits.
    """
    b, block = image_and_part(blocks)
    i = block * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    # A position outside the canvas gives a wrong order, but never a store outside the tables.
    # [BLOCK]
    x = tl.minimum(tl.maximum(tl.load(POS + (b * N + i) * 2, mask=live, other=0), 0), width - 1)
    # [BLOCK]
    y = tl.minimum(tl.maximum(tl.load(POS + (b * N + i) * 2 + 1, mask=live, other=0), 0), height - 1)
    if ONE_CELL:
        cells = 1
        walk = tl.zeros([BLOCK], tl.int32)
        ratio = tl.zeros([BLOCK], tl.int64)
    else:
        cells = rows * columns
        column = x * columns // width
        row = y * rows // height
        walk = row * columns + tl.where(row % 2 == 0, column, columns - 1 - column)
        own_x, own_y = _centre(walk, rows, columns, width, height)
        before_x, before_y = _centre(tl.maximum(walk - 1, 0), rows, columns, width, height)
        after_x, after_y = _centre(tl.minimum(walk + 1, cells - 1), rows, columns, width, height)
        # The walk's ends go on straight beyond the canvas.
        previous_x = tl.where(walk == 0, 2 * own_x - after_x, before_x)
        previous_y = tl.where(walk == 0, 2 * own_y - after_y, before_y)
        next_x = tl.where(walk == cells - 1, 2 * own_x - before_x, after_x)
        next_y = tl.where(walk == cells - 1, 2 * own_y - before_y, after_y)
        unit = 2 * cells
        px, py = x.to(tl.int64) * unit, y.to(tl.int64) * unit
        near = (px - previous_x) * (px - previous_x) + (py - previous_y) * (py - previous_y)
        far = (px - next_x) * (px - next_x) + (py - next_y) * (py - next_y)
        epsilon = epsilon_bits.to(tl.int64).to(tl.float64, bitcast=True)
        ratio = (near.to(tl.float64) / (far.to(tl.float64) + epsilon)).to(tl.int64, bitcast=True)
    tl.store(WALK + b * N + i, walk, mask=live)
    tl.store(RATIO + b * N + i, ratio, mask=live)
    cell = b * cells + walk
    slot = tl.atomic_add(COUNT + cell, 1, mask=live)
    held = live & (slot < slots)
    tl.store(CELL_RATIO + cell * slots + slot, ratio, mask=held)
    tl.store(CELL_CANVAS + cell * slots + slot, y.to(tl.int64) * width + x, mask=held)


@triton.jit(do_not_specialize=["N", "blocks", "cells", "width", "slots"])
def _order_kernel(
    POS, WALK, RATIO, COUNT, FILLED, CELL_RATIO, CELL_CANVAS, ORDER, ORDERED,
    N, blocks, cells, width, slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens to their places: tokens of earlier cells, plus those of the own cell that come before
    by (ratio, canvas index)."""
    b, block = image_and_part(blocks)
    i = block * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    # All of [BLOCK]
    x = tl.load(POS + (b * N + i) * 2, mask=live, other=0)
    y = tl.load(POS + (b * N + i) * 2 + 1, mask=live, other=0)
    ratio = tl.load(RATIO + b * N + i, mask=live, other=0)
    cell = b * cells + tl.load(WALK + b * N + i, mask=live, other=0)
    count = tl.load(COUNT + cell, mask=live, other=0)
    place = tl.load(FILLED + cell, mask=live, other=0) - count
    canvas = y.to(tl.int64) * width + x
    for slot in range(tl.max(count, 0)):
        # [BLOCK], one other token of each token's cell
        other_ratio = tl.load(CELL_RATIO + cell * slots + slot, mask=slot < count, other=0)
        other_canvas = tl.load(CELL_CANVAS + cell * slots + slot, mask=slot < count, other=0)
        first = (other_ratio < ratio) | ((other_ratio == ratio) & (other_canvas < canvas))
        place += (first & (slot < count)).to(tl.int32)
    tl.store(ORDER + b * N + place, i.to(tl.int64), mask=live)
    tl.store(ORDERED + (b * N + place) * 2, x, mask=live)
    tl.store(ORDERED + (b * N + place) * 2 + 1, y, mask=live)


@triton.jit(do_not_specialize=["N", "K", "blocks", "scale", "last_scale"])
def _sum_kernel(ORDERED, SUM, N, K, blocks, scale, last_scale, M: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the scaled position sums (x, y) of BLOCK clusters of M rows."""
    b, block = image_and_part(blocks)
    c = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.int32)
    y = tl.zeros([BLOCK], tl.int32)
    for member in range(M):
        row = c * M + member
        # [BLOCK]
        x += tl.load(ORDERED + (b * N + row) * 2, mask=row < N, other=0)
        y += tl.load(ORDERED + (b * N + row) * 2 + 1, mask=row < N, other=0)
    factor = tl.where(c == K - 1, last_scale, scale)
    tl.store(SUM + (b * K + c) * 2, x * factor, mask=c < K)
    tl.store(SUM + (b * K + c) * 2 + 1, y * factor, mask=c < K)


@triton.jit(do_not_specialize=["N", "K", "blocks", "size"])
def _nearest_kernel(
    ORDERED, SUM, NEAREST, N, K, blocks, size,
    C: tl.constexpr, CP: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the C smallest of key(i, c) = |size p_i - sum_c|^2 K + c, ascending, for NB tokens i.

    Keys are distinct, so the next smallest is the least one above the last. WIDE: keys need 64 bits.
    """
    dtype: tl.constexpr = tl.int64 if WIDE else tl.int32
    limit: tl.constexpr = 2**63 - 1 if WIDE else 2**31 - 1
    b, block = image_and_part(blocks)
    i = block * NB + tl.arange(0, NB)
    # [NB]
    x = tl.load(ORDERED + (b * N + i) * 2, mask=i < N, other=0) * size
    y = tl.load(ORDERED + (b * N + i) * 2 + 1, mask=i < N, other=0) * size
    place = tl.arange(0, CP)
    best = tl.full([NB, CP], limit, dtype)
    for k0 in range(0, K, KB):
        c = k0 + tl.arange(0, KB)
        # [KB]
        sum_x = tl.load(SUM + (b * K + c) * 2, mask=c < K, other=0)
        sum_y = tl.load(SUM + (b * K + c) * 2 + 1, mask=c < K, other=0)
        dx = (x[:, None] - sum_x[None, :]).to(dtype)
        dy = (y[:, None] - sum_y[None, :]).to(dtype)
        key = tl.where(c[None, :] < K, (dx * dx + dy * dy) * K + c[None, :], limit)
        earlier = best
        best = tl.full([NB, CP], limit, dtype)
        last = tl.full([NB], -1, dtype)
        for step in range(C):
            here = tl.min(tl.where(key > last[:, None], key, limit), 1)
            kept = tl.min(tl.where(earlier > last[:, None], earlier, limit), 1)
            last = tl.minimum(here, kept)
            best = tl.where(place[None, :] == step, last[:, None], best)
    out = NEAREST + (b * N + i[:, None]) * C + place[None, :]
    tl.store(out, (best % K).to(tl.int32), mask=(i[:, None] < N) & (place[None, :] < C))


def _order(pos_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int) -> tuple[Tensor, Tensor]:
    """order_BN and the ordered positions."""
    batch, tokens, _ = pos_BN2.shape
    height, width = canvas_hw
    rows, columns = anchor_grid(tokens, canvas_hw, cluster_size)
    one_cell = rows * columns < 3
    cells = 1 if one_cell else rows * columns
    # No anchor cell covers more canvas cells than this.
    slots = tokens if one_cell else min(tokens, -(-height // rows) * -(-width // columns))
    (epsilon_bits,) = struct.unpack("<q", struct.pack("<d", 1e-5 * (2 * rows * columns) ** 2))
    device = pos_BN2.device
    walk_BN = torch.empty(batch, tokens, dtype=torch.int32, device=device)
    ratio_BN = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    count_BL = torch.zeros(batch, cells, dtype=torch.int32, device=device)
    ratio_BLS = torch.empty(batch, cells, slots, dtype=torch.int64, device=device)
    canvas_BLS = torch.empty(batch, cells, slots, dtype=torch.int64, device=device)
    order_BN = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    ordered_BN2 = torch.empty_like(pos_BN2)
    blocks = triton.cdiv(tokens, TOKENS)
    # Tokens into the slots of their anchor cells
    _cell_kernel[(batch * blocks,)](
        POS=pos_BN2, WALK=walk_BN, RATIO=ratio_BN, COUNT=count_BL, CELL_RATIO=ratio_BLS, CELL_CANVAS=canvas_BLS,
        N=tokens, blocks=blocks, rows=rows, columns=columns, width=width, height=height, slots=slots,
        epsilon_bits=epsilon_bits, ONE_CELL=one_cell, BLOCK=TOKENS, num_warps=4,
    )  # fmt: skip
    # Every token to its place: tokens of earlier cells, and earlier ones of its own cell
    filled_BL = count_BL.cumsum(1, dtype=torch.int32)
    _order_kernel[(batch * blocks,)](
        POS=pos_BN2, WALK=walk_BN, RATIO=ratio_BN, COUNT=count_BL, FILLED=filled_BL, CELL_RATIO=ratio_BLS,
        CELL_CANVAS=canvas_BLS, ORDER=order_BN, ORDERED=ordered_BN2,
        N=tokens, blocks=blocks, cells=cells, width=width, slots=slots, BLOCK=TOKENS, num_warps=4,
    )  # fmt: skip
    return order_BN, ordered_BN2


def _nearest(ordered_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int, clusters: int) -> Tensor:
    """nearest_BNC by the reference's key, divided by what all distances have in common."""
    batch, tokens, _ = ordered_BN2.shape
    count = triton.cdiv(tokens, cluster_size)
    last = tokens - (count - 1) * cluster_size
    common = math.gcd(cluster_size, last)
    size = cluster_size * last // common
    largest = size**2 * ((canvas_hw[0] - 1) ** 2 + (canvas_hw[1] - 1) ** 2) * count + count
    width = min(clusters, count)
    # Position sums of the clusters
    sum_BK2 = torch.empty(batch, count, 2, dtype=torch.int32, device=ordered_BN2.device)
    blocks = triton.cdiv(count, TOKENS)
    _sum_kernel[(batch * blocks,)](
        ORDERED=ordered_BN2, SUM=sum_BK2, N=tokens, K=count, blocks=blocks, scale=last // common,
        last_scale=cluster_size // common, M=cluster_size, BLOCK=TOKENS, num_warps=4,
    )  # fmt: skip
    # The smallest keys of every token
    nearest_BNC = torch.empty(batch, tokens, width, dtype=torch.int32, device=ordered_BN2.device)
    wide = largest >= 2**31
    tile = TILE // 2 if wide else TILE
    columns = min(tile, triton.next_power_of_2(count))
    rows = min(MOST_ROWS, tile // columns)
    blocks = triton.cdiv(tokens, rows)
    _nearest_kernel[(batch * blocks,)](
        ORDERED=ordered_BN2, SUM=sum_BK2, NEAREST=nearest_BNC, N=tokens, K=count, blocks=blocks, size=size,
        C=width, CP=triton.next_power_of_2(width), NB=rows, KB=columns, WIDE=wide, num_warps=1,
    )  # fmt: skip
    return nearest_BNC


def build(
    pos_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int, clusters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns order_BN (int64), the ordered pos_BN2 (int32) and nearest_BNC (int32), as the reference does."""
    order_BN, ordered_BN2 = _order(pos_BN2.contiguous(), canvas_hw, cluster_size)
    return order_BN, ordered_BN2, _nearest(ordered_BN2, canvas_hw, cluster_size, clusters)
