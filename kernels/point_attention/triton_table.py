"""The table of nearest tokens and its inverse, in Triton.

The search is separable: first the 4 nearest occupied columns of every canvas row, for every x; then each cell merges
rows at distance 0, 1, 2, ... by the whole-number key (squared distance, canvas index) until no nearer row is left.
Exact for any pattern of tokens; a cell in the middle of a hole costs as many rows as the hole is high.

The packed table carries the positions along, so that a sample needs one look-up and not two. The inverse lists the
table's entries by token. Ranks inside a token's list come from integer atomics: their order differs from run to run,
and nothing that is summed over such a list depends on it. `NearestTable` says how both are packed.

Axes: B batch, N tokens, T canvas cells, E = 4 * T entries of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NEAREST = 4
FIRST_OF_TOKEN = tl.constexpr(1 << 30)
"""Marks the first entry of each token in the inverse table; entries need 18 bits."""
ABSENT = tl.constexpr(0xFFFF)
"""The column of a candidate that a row does not have."""
NO_KEY = tl.constexpr(0x7FFFFFFF)
"""Larger than every key of a column."""

_RASTER_BLOCK = 256
_INVERSE_BLOCK = 1024
_CELLS = 32
"""Cells of one merging program, one warp: a program is as slow as its slowest cell (H200: 64 and 128 lost)."""


@triton.jit(do_not_specialize=["N", "CANVAS_H", "CANVAS_W"])
def _raster_kernel(POS, RASTER, N, CANVAS_H, CANVAS_W, BLOCK: tl.constexpr):
    """One program: writes the rows of BLOCK tokens into the cells that they stand on."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    # [BLOCK]
    x = tl.load(POS + b * N * 2 + n * 2, mask=n < N, other=0)
    y = tl.load(POS + b * N * 2 + n * 2 + 1, mask=n < N, other=0)
    # Stray positions must not write into memory.
    inside = (n < N) & (x >= 0) & (x < CANVAS_W) & (y >= 0) & (y < CANVAS_H)
    tl.store(RASTER + b * (CANVAS_H * CANVAS_W) + y * CANVAS_W + x, n, mask=inside)


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


@triton.jit(do_not_specialize=["CANVAS_H", "CANVAS_W"])
def _columns_kernel(RASTER, COLUMNS, CANVAS_H, CANVAS_W, XB: tl.constexpr):
    """One program: for every x of one canvas row the 4 nearest occupied columns of that row, 16 bits each."""
    y = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    x = tl.arange(0, XB)
    row = b * (CANVAS_H * CANVAS_W) + y * CANVAS_W
    k0 = tl.full([XB], NO_KEY, tl.int32)
    k1 = k0
    k2 = k0
    k3 = k0
    for column in range(CANVAS_W):
        occupied = tl.load(RASTER + row + column) >= 0
        key = tl.where(occupied, (tl.abs(x - column) << 16) | column, NO_KEY)
        k0, k1, k2, k3 = _insert(k0, k1, k2, k3, key)
    low = (k0 & 0xFFFF) | (k1 << 16)
    high = (k2 & 0xFFFF) | (k3 << 16)
    packed = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
    tl.store(COLUMNS + row + x, packed, mask=x < CANVAS_W)


@triton.jit(do_not_specialize=["CANVAS_H", "CANVAS_W"])
def _merge_kernel(RASTER, COLUMNS, TABLE, PACKED, CANVAS_H, CANVAS_W, CELLS: tl.constexpr, BITS: tl.constexpr):
    """One program: the 4 nearest tokens of CELLS cells of one canvas row. BITS hold a coordinate in the key."""
    KEY: tl.constexpr = tl.int32 if BITS == 7 else tl.int64
    FAR: tl.constexpr = 0x7FFFFFFF if BITS == 7 else 0x7FFFFFFFFFFFFFFF
    x = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    y = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    live = x < CANVAS_W
    image = b * (CANVAS_H * CANVAS_W)
    k0 = tl.where(live, FAR, 0).to(KEY)  # 0 beyond the border: those lanes want no further row
    k1 = k0
    k2 = k0
    k3 = k0
    step = 0
    # Equality goes on: a token at the same distance may have the lower canvas index.
    while (step < CANVAS_H) & ((tl.max(k3, 0) >> (2 * BITS)) >= step * step):
        for side in tl.static_range(2):
            other_y = y - step if side == 0 else y + step
            use = live & (other_y >= 0) & (other_y < CANVAS_H) & ((side == 0) | (step > 0))
            # [CELLS] candidates of one row
            candidates = tl.load(COLUMNS + image + other_y * CANVAS_W + x, mask=use, other=-1)
            for k in tl.static_range(4):
                column = ((candidates >> (16 * k)) & 0xFFFF).to(tl.int32)
                squared = (column - x) * (column - x) + step * step
                key = (squared.to(KEY) << (2 * BITS)) | ((other_y << BITS) | column).to(KEY)
                k0, k1, k2, k3 = _insert(k0, k1, k2, k3, tl.where(column != ABSENT, key, FAR))
        step += 1
    out = (image + y * CANVAS_W + x) * 4
    for k in tl.static_range(4):
        key = k0 if k == 0 else (k1 if k == 1 else (k2 if k == 2 else k3))
        found = live & (key != FAR)
        token_x = key.to(tl.int32) & ((1 << BITS) - 1)
        token_y = (key.to(tl.int32) >> BITS) & ((1 << BITS) - 1)
        # [CELLS] rows of the tokens
        token = tl.load(RASTER + image + token_y * CANVAS_W + token_x, mask=found, other=0)
        tl.store(TABLE + out + k, tl.where(found, token, -1), mask=live)
        tl.store(PACKED + out + k, tl.where(found, (token << 16) | (token_y << 8) | token_x, -1), mask=live)


@triton.jit(do_not_specialize=["N", "E"])
def _rank_kernel(TABLE, COUNT, RANK, N, E, BLOCK: tl.constexpr):
    """One program: ranks of BLOCK entries among those of their token, in arbitrary order."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    token = tl.load(TABLE + b * E + e, mask=e < E, other=-1)
    rank = tl.atomic_add(COUNT + b * N + token, 1, mask=token >= 0, sem="relaxed")
    tl.store(RANK + b * E + e, rank, mask=token >= 0)


@triton.jit(do_not_specialize=["N", "E"])
def _invert_kernel(TABLE, COUNT, END, RANK, ENTRY, N, E, BLOCK: tl.constexpr):
    """One program: puts BLOCK entries into the lists of their tokens and marks rank 0 as the token's first."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK] tokens, and where their lists begin
    token = tl.load(TABLE + b * E + e, mask=e < E, other=-1)
    real = token >= 0
    start = tl.load(END + b * N + token, mask=real, other=0) - tl.load(COUNT + b * N + token, mask=real, other=0)
    rank = tl.load(RANK + b * E + e, mask=real, other=0)
    tl.store(ENTRY + b * E + start + rank, tl.where(rank == 0, e | FIRST_OF_TOKEN, e), mask=real)


def nearest_table(pos_BN2: Tensor, canvas_hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of `NearestTable`."""
    pos_BN2 = pos_BN2.contiguous()
    batch, tokens, _ = pos_BN2.shape
    canvas_h, canvas_w = canvas_hw
    cells = canvas_h * canvas_w
    canvas = {"CANVAS_H": canvas_h, "CANVAS_W": canvas_w}
    # Tokens on the canvas.
    raster_BT = pos_BN2.new_full((batch, cells), -1)
    _raster_kernel[triton.cdiv(tokens, _RASTER_BLOCK), batch](
        POS=pos_BN2, RASTER=raster_BT, N=tokens, **canvas, BLOCK=_RASTER_BLOCK, num_warps=2
    )
    # Nearest columns of each row.
    columns_BT = pos_BN2.new_empty(batch, cells, dtype=torch.int64)
    padded = max(32, triton.next_power_of_2(canvas_w))
    _columns_kernel[canvas_h, batch](
        RASTER=raster_BT, COLUMNS=columns_BT, **canvas, XB=padded, num_warps=max(1, padded // 64)
    )
    # Nearest tokens of each cell.
    table_BT4 = pos_BN2.new_empty(batch, cells, NEAREST)
    packed_BT4 = pos_BN2.new_empty(batch, cells, NEAREST)
    bits = 7 if max(canvas_h, canvas_w) <= 128 else 8
    _merge_kernel[triton.cdiv(canvas_w, _CELLS), canvas_h, batch](
        RASTER=raster_BT,
        COLUMNS=columns_BT,
        TABLE=table_BT4,
        PACKED=packed_BT4,
        **canvas,
        CELLS=_CELLS,
        BITS=bits,
        num_warps=1,
    )
    return table_BT4, packed_BT4, _invert(table_BT4, tokens)


def _invert(table_BT4: Tensor, tokens: int) -> Tensor:
    """The entries in the order of their tokens, [B, E]."""
    batch, cells, _ = table_BT4.shape
    entries = cells * NEAREST
    grid = triton.cdiv(entries, _INVERSE_BLOCK), batch
    # Lengths of the lists and ranks within them.
    count_BN = table_BT4.new_zeros(batch, tokens)
    rank_BE = table_BT4.new_empty(batch, entries)
    _rank_kernel[grid](TABLE=table_BT4, COUNT=count_BN, RANK=rank_BE, N=tokens, E=entries, BLOCK=_INVERSE_BLOCK)
    end_BN = count_BN.cumsum(1, dtype=torch.int32)
    # Sets of less than 4 tokens leave the end of the lists open.
    entry_BE = table_BT4.new_empty(batch, entries)
    if tokens < NEAREST:
        entry_BE.fill_(-1)
    _invert_kernel[grid](
        TABLE=table_BT4,
        COUNT=count_BN,
        END=end_BN,
        RANK=rank_BE,
        ENTRY=entry_BE,
        N=tokens,
        E=entries,
        BLOCK=_INVERSE_BLOCK,
    )
    return entry_BE
