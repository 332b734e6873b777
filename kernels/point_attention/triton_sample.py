"""What the forward and the backward kernels of point attention share: where a sample lies and what it reads.

Axes of tiles: S samples, 4 nearest tokens, QB queries of one program, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

SAMPLES = 4
OWNERS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))
"""Gathered tiles have the axes rows, owners and D, and rows are summed. Lanes must lie on owners and D: of two axes
that are equally contiguous Triton 3.6 gives the lanes to the first and 3.7 to the second. Lanes on the rows turn the
sum into shuffles (H200: 1.15 times slower with one warp, 3.5 with two, 10 with four)."""
ROWS = tl.constexpr(1 if OWNERS_FIRST.value else 0)
"""The axis of the rows in a gathered tile."""
ROUND = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds an fp32 number below 2^22 to a whole one, halves to even."""
NO_DISTANCE = tl.constexpr(1e-30)
"""Squared distances up to here count as 0; rsqrt would overflow on still smaller ones."""


@dataclass(frozen=True)
class LaunchConfig:
    """How the work is divided."""

    queries: int
    """Queries of one forward program; one warp, one head."""
    backward_queries: int
    """Queries of one backward program; two warps, one head."""
    tokens: int
    """Tokens whose lists one program of the values' gradient sums; one warp, one head."""
    entries: int
    """Entries of each such list that it takes at a time."""


def launch_config(queries: int, tokens: int, row_bytes: int) -> LaunchConfig:
    """How to divide the work; `row_bytes` is the size of one head of a value.

    Medians on an H200 with bf16 heads of 64 and 65,536 queries. Forward: 4 queries in one warp 96 us, 8 in two as much,
    16 in four 96 and in two 122. Values, tokens x entries: lists of 16 (queries = tokens) 4x8 156 us, 8x4 185, 1x16
    256; uneven ones of 40 1x32 187, 4x8 301; of 252 1x64 153, 1x32 168, 4x8 384. Longer rows halve the tiles, for
    their registers; shorter ones need more owners to occupy the lanes of a warp.
    """
    mean = queries * SAMPLES * 4 / tokens
    # As many queries as tokens means self-attention, whose lists are of like length; others differ widely.
    if mean < 24 and queries == tokens:
        lists = (4, 8)
    else:
        lists = (1, 64 if mean > 90 else 32)
    if row_bytes > 128:
        return LaunchConfig(2, 4, lists[0], lists[1] // 2)
    if row_bytes <= 64:
        return LaunchConfig(8, 8, 8 if lists[0] == 4 else 1, lists[1])
    return LaunchConfig(4, 8, *lists)


@triton.jit
def cell_of(x, y, W, H):
    """Canvas index of the cell that a location rounds to, clamped to the canvas; NaN counts as 0."""
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), 0.0), W - 1.0)
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), 0.0), H - 1.0)
    return ((y + ROUND) - ROUND).to(tl.int32) * W + ((x + ROUND) - ROUND).to(tl.int32)


@triton.jit
def positive(tau):
    """relu that keeps NaN."""
    return tl.where(tau < 0, 0.0, tau)


@triton.jit
def owners(tile):
    """[rows, owners] in the order of `OWNERS_FIRST`."""
    return tl.trans(tile) if OWNERS_FIRST else tile


@triton.jit
def split_program(TILES, A):
    """Image, head and tile of this program."""
    pid = tl.program_id(0)
    return pid // (TILES * A), (pid // TILES) % A, pid % TILES


@triton.jit
def gathered_rows(packed, b, a, N, A: tl.constexpr, S: tl.constexpr, QB: tl.constexpr):
    """Rows of [B, N, A] that packed entries [S, 4, QB] name, as `owners`; the image's row 0 for no token."""
    token = tl.where(packed != -1, (packed >> 16) & 0xFFFF, 0)
    return owners(tl.reshape((b * N + token) * A + a, [S * 4, QB]))


@triton.jit
def sample(QUERY_POS, OFFSET, LOGIT, PACKED, tau, b, a, q, NQ, W, H, A: tl.constexpr, S: tl.constexpr):
    """What queries q of image b and head a read.

    Returns:
        softmax of the logits [S, QB]; softmax of the closeness, distance, direction (x, y) from the token and packed
        entry of the table, each [S, 4, QB]; element of the sample and its cell [S, QB].
    """
    row = (b * NQ + q)[None, :]
    element = (row * A + a) * S + tl.arange(0, S)[:, None]
    x = tl.load(QUERY_POS + row * 2).to(tl.float32) + tl.load(OFFSET + element * 2).to(tl.float32)
    y = tl.load(QUERY_POS + row * 2 + 1).to(tl.float32) + tl.load(OFFSET + element * 2 + 1).to(tl.float32)
    logit = tl.load(LOGIT + element).to(tl.float32)
    mix = tl.exp(logit - tl.max(logit, 0)[None, :])
    mix = mix / tl.sum(mix, 0)[None, :]
    cell = cell_of(x, y, W, H)
    k = tl.arange(0, 4)[None, :, None]
    packed = tl.load(PACKED + (b * (W * H) + cell)[:, None, :] * 4 + k)
    real = packed != -1
    from_x = x[:, None, :] - (packed & 255).to(tl.float32)
    from_y = y[:, None, :] - ((packed >> 8) & 255).to(tl.float32)
    squared = from_x * from_x + from_y * from_y
    inverse = tl.where(squared > NO_DISTANCE, tl.rsqrt(squared), 0.0)
    distance = squared * inverse
    # The nearest is subtracted before tau multiplies: exact for any tau.
    further = distance - tl.min(tl.where(real, distance, float("inf")), 1)[:, None, :]
    near = tl.where(real, tl.exp(-tau * further), 0.0)
    near = near * (1.0 / tl.sum(near, 1))[:, None, :]
    return mix, near, distance, from_x * inverse, from_y * inverse, packed, element, cell
