"""The table of nearest tokens and its inverse, in Triton.

The search is separable: first the 4 nearest occupied columns of every canvas row, for every x; then each cell merges
rows at distance 0, 1, 2, ... by the whole-number key (squared distance, canvas index) until no nearer row is left.
Exact for any pattern of tokens; a cell in the middle of a hole costs as many rows as the hole is high.

The packed table carries the positions along, so that a sample needs one look-up and not two:
`token << 16 | y << 8 | x`, or -1 where a set has fewer than 4 tokens. The inverse lists the table's entries
(4 * cell + k) by token. Ranks inside a token's list come from integer atomics: their order differs from run to run,
and nothing that is summed over such a list depends on it.

Axes: B batch, N tokens, T canvas cells, H canvas rows, W canvas columns, E = 4 * T entries of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NEAREST = 4
ABSENT = tl.constexpr(0xFFFF)
"""The column of a candidate that a row does not have."""

_RASTER_BLOCK = 256
_INVERSE_BLOCK = 1024
_CELLS = 32
"""Cells of one merging program, one warp: a program is as slow as its slowest cell (H200: 64 and 128 lost)."""


@triton.jit(do_not_specialize=["N", "W", "H"])
def _raster_kernel(POS, RASTER, N, W, H, BLOCK: tl.constexpr):
    """One program: writes the rows of BLOCK tokens into the cells that they stand on."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1)
    x = tl.load(POS + (b * N + n) * 2, mask=n < N, other=0)
    y = tl.load(POS + (b * N + n) * 2 + 1, mask=n < N, other=0)
    inside = (n < N) & (x >= 0) & (x < W) & (y >= 0) & (y < H)  # stray positions must not write into memory
    tl.store(RASTER + (b * H + y) * W + x, n, mask=inside)


@triton.jit
def _insert(k0, k1, k2, k3, key):
    """The four least of five keys, sorted."""
    least = tl.minimum(k0, key)
    key = tl.maximum(k0, key)
    second = tl.minimum(k1, key)
    key = tl.maximum(k1, key)
    third = tl.minimum(k2, key)
    key = tl.maximum(k2, key)
    return least, second, third, tl.minimum(k3, key)


@triton.jit(do_not_specialize=["W", "H"])
def _columns_kernel(RASTER, COLUMNS, W, H, XB: tl.constexpr):
    """One program: for every x of one canvas row the 4 nearest occupied columns of that row, 16 bits each."""
    y = tl.program_id(0)
    b = tl.program_id(1)
    x = tl.arange(0, XB)
    row = (b * H + y) * W
    k0 = tl.full([XB], 0x7FFFFFFF, tl.int32)
    k1 = k0
    k2 = k0
    k3 = k0
    for column in range(W):
        occupied = tl.load(RASTER + row + column) >= 0
        key = tl.where(occupied, (tl.abs(x - column) << 16) | column, 0x7FFFFFFF)
        k0, k1, k2, k3 = _insert(k0, k1, k2, k3, key)
    low = (k0 & 0xFFFF) | (k1 << 16)
    high = (k2 & 0xFFFF) | (k3 << 16)
    packed = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
    tl.store(COLUMNS + row + x, packed, mask=x < W)


@triton.jit(do_not_specialize=["W", "H"])
def _table_merge_kernel(RASTER, COLUMNS, TABLE, PACKED, W, H, CELLS: tl.constexpr, BITS: tl.constexpr):
    """One program: the 4 nearest tokens of CELLS cells of one canvas row. BITS hold a coordinate in the key."""
    KEY: tl.constexpr = tl.int32 if BITS == 7 else tl.int64
    FAR: tl.constexpr = 0x7FFFFFFF if BITS == 7 else 0x7FFFFFFFFFFFFFFF
    programs_per_row = tl.cdiv(W, CELLS)
    b = tl.program_id(1)
    y = tl.program_id(0) // programs_per_row
    x = (tl.program_id(0) % programs_per_row) * CELLS + tl.arange(0, CELLS)
    live = x < W
    k0 = tl.where(live, FAR, 0).to(KEY)  # 0 beyond the border: those lanes want no further row
    k1 = k0
    k2 = k0
    k3 = k0
    step = 0
    # Equality goes on: a token at the same distance may have the lower canvas index.
    while (step < H) & ((tl.max(k3, 0) >> (2 * BITS)) >= step * step):
        for side in tl.static_range(2):
            other_y = y - step if side == 0 else y + step
            use = live & (other_y >= 0) & (other_y < H) & ((side == 0) | (step > 0))
            candidates = tl.load(COLUMNS + (b * H + other_y) * W + x, mask=use, other=-1)
            for k in tl.static_range(4):
                column = ((candidates >> (16 * k)) & 0xFFFF).to(tl.int32)
                squared = (column - x) * (column - x) + step * step
                key = (squared.to(KEY) << (2 * BITS)) | ((other_y << BITS) | column).to(KEY)
                k0, k1, k2, k3 = _insert(k0, k1, k2, k3, tl.where(column != ABSENT, key, FAR))
        step += 1
    out = ((b * H + y) * W + x) * 4
    for k in tl.static_range(4):
        key = k0 if k == 0 else (k1 if k == 1 else (k2 if k == 2 else k3))
        found = live & (key != FAR)
        token_x = key.to(tl.int32) & ((1 << BITS) - 1)
        token_y = (key.to(tl.int32) >> BITS) & ((1 << BITS) - 1)
        token = tl.load(RASTER + (b * H + token_y) * W + token_x, mask=found, other=0)
        tl.store(TABLE + out + k, tl.where(found, token, -1), mask=live)
        tl.store(PACKED + out + k, tl.where(found, (token << 16) | (token_y << 8) | token_x, -1), mask=live)


@triton.jit(do_not_specialize=["N", "E"])
def _rank_kernel(TABLE, COUNT, RANK, N, E, BLOCK: tl.constexpr):
    """One program: ranks of BLOCK entries among those of their token, in arbitrary order."""
    b = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(TABLE + b * E + e, mask=e < E, other=-1)
    rank = tl.atomic_add(COUNT + b * N + token, 1, mask=token >= 0, sem="relaxed")
    tl.store(RANK + b * E + e, rank, mask=token >= 0)


@triton.jit(do_not_specialize=["N", "E"])
def _invert_kernel(TABLE, COUNT, END, RANK, ENTRY, FIRST, N, E, BLOCK: tl.constexpr):
    """One program: puts BLOCK entries into the lists of their tokens; rank 0 is also the token's first."""
    b = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(TABLE + b * E + e, mask=e < E, other=-1)
    real = token >= 0
    of_token = b * N + token
    start = tl.load(END + of_token, mask=real, other=0) - tl.load(COUNT + of_token, mask=real, other=0)
    rank = tl.load(RANK + b * E + e, mask=real, other=0)
    tl.store(ENTRY + b * E + start + rank, e, mask=real)
    tl.store(FIRST + of_token, e, mask=real & (rank == 0))


@torch.library.custom_op("affmae::nearest_table", mutates_args=())
def nearest_table(pos_BN2: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the package for the table.

    Returns:
        table_BT4: int32 token rows.
        packed_BT4: int32 token << 16 | y << 8 | x, or -1.
        entry_BE: int32 entries 4 * cell + k in the order of their tokens; -1 fills the end.
        first_BN: int32, the entry with which the list of each token begins.
    """
    pos_BN2 = pos_BN2.contiguous()
    batch, tokens, _ = pos_BN2.shape
    cells = height * width
    raster_BT = pos_BN2.new_full((batch, cells), -1)
    _raster_kernel[(triton.cdiv(tokens, _RASTER_BLOCK), batch)](
        pos_BN2, raster_BT, tokens, width, height, BLOCK=_RASTER_BLOCK, num_warps=2
    )
    columns_BT = pos_BN2.new_empty(batch, cells, dtype=torch.int64)
    padded = max(32, triton.next_power_of_2(width))
    _columns_kernel[(height, batch)](raster_BT, columns_BT, width, height, XB=padded, num_warps=max(1, padded // 64))
    table_BT4 = pos_BN2.new_empty(batch, cells, NEAREST)
    packed_BT4 = pos_BN2.new_empty(batch, cells, NEAREST)
    bits = 7 if max(height, width) <= 128 else 8
    _table_merge_kernel[(triton.cdiv(width, _CELLS) * height, batch)](
        raster_BT, columns_BT, table_BT4, packed_BT4, width, height, CELLS=_CELLS, BITS=bits, num_warps=1
    )
    return table_BT4, packed_BT4, *_invert(table_BT4, tokens)


def _invert(table_BT4: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    batch, cells, _ = table_BT4.shape
    entries = cells * NEAREST
    # Every token is nearest to its own cell, which fills `first`; positions that are not distinct would leave zeros.
    count_BN, first_BN = table_BT4.new_zeros(2, batch, tokens)
    rank_BE = table_BT4.new_empty(batch, entries)
    grid = (triton.cdiv(entries, _INVERSE_BLOCK), batch)
    _rank_kernel[grid](table_BT4, count_BN, rank_BE, tokens, entries, BLOCK=_INVERSE_BLOCK)
    end_BN = count_BN.cumsum(1, dtype=torch.int32)
    # Short sets leave the end of the lists open.
    entry_BE = table_BT4.new_empty(batch, entries)
    if tokens < NEAREST:
        entry_BE.fill_(-1)
    _invert_kernel[grid](
        table_BT4, count_BN, end_BN, rank_BE, entry_BE, first_BN, tokens, entries, BLOCK=_INVERSE_BLOCK
    )
    return entry_BE, first_BN


@nearest_table.register_fake
def _(pos_BN2: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = pos_BN2.shape
    cells = height * width
    table_BT4 = pos_BN2.new_empty(batch, cells, NEAREST)
    lists_BE, first_BN = pos_BN2.new_empty(batch, cells * NEAREST), pos_BN2.new_empty(batch, tokens)
    return table_BT4, torch.empty_like(table_BT4), lists_BE, first_BN
