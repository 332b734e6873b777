"""Device functions for kernels that work on pairs of tokens taken from visit lists."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_and_part(PARTS):
    """Image (int64) and part of this program, in a grid of images * PARTS."""
    return (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS


@triton.jit
def positions(POS, row):
    """x and y of the given rows of one image, fp32."""
    # [len(row)]
    x = tl.load(POS + row * 2).to(tl.float32)
    y = tl.load(POS + row * 2 + 1).to(tl.float32)
    return x, y


@triton.jit
def read_columns(ENTRY, e0, count, SIZE, TILE: tl.constexpr):
    """Rows (clamped to SIZE - 1) and membership bits of the members of TILE listed clusters, int32 [8 * TILE]."""
    j = tl.arange(0, TILE * 8)
    slot = e0 + j // 8
    # [8 * TILE]
    entry = tl.load(ENTRY + slot, mask=slot < count, other=0)
    row = (entry >> 16) * 8 + j % 8
    bits = tl.where(row < SIZE, entry & 0xFFFF, 0)  # a short last cluster has no such member
    return tl.minimum(row, SIZE - 1), bits


@triton.jit
def pair_geometry(dx, dy):
    """(d, dy/d, dx/d). d is 0 or at least 1; the bound keeps rsqrt finite at 0, where all three become exactly 0."""
    square = dx * dx + dy * dy
    inverse = tl.rsqrt(tl.maximum(square, 0.5))
    return square * inverse, dy * inverse, dx * inverse
