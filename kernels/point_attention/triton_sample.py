"""What the forward and backward kernels of point attention share: where a sample lies and which tokens it reads.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples; of tiles QB queries, 4 nearest tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.point_attention import LARGEST_STRIDE

SAMPLES = 4
OWNERS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))
"""Axis order of gathered tiles, whose axes are rows, owners (queries or tokens) and D; rows are summed. Lanes must lie
on owners and D. Of two axes that are equally contiguous, Triton 3.6 gives the lanes to the first and 3.7 to the second.
Lanes on the rows turn the sum into shuffles (H200: 1.15 times slower with one warp, 3.5 with two, 10 with four)."""
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
    """Tokens whose edges one program of the value gradient sums; one warp, one head."""
    edges: int
    """Edges of each such token that it takes at a time."""


def launch_config(queries: int, tokens: int, row_bytes: int) -> LaunchConfig:
    """How to divide the work; `row_bytes` is the size of one head of a value.

    Medians on an H200 with bf16 heads of 64 and 65,536 queries. Forward: 4 queries in one warp 96 us, 8 in two as much,
    16 in four 96 and in two 122. Value gradient, tokens x edges: lists of 16 (queries = tokens) 4x8 156 us, 8x4 185,
    1x16 256; uneven ones of 40 1x32 187, 4x8 301; of 252 1x64 153, 1x32 168, 4x8 384. Longer rows halve the tiles, for
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


def row_stride(tensor: Tensor) -> int | None:
    """Elements from one row to the next if a [B, N, ...] consists of dense rows at equal distances; None if not.

    So do contiguous tensors and slices of the last axis of a wider contiguous matrix.
    """
    dense = 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size > 1 and stride != dense:
            return None
        dense *= size
    batch, rows = tensor.shape[:2]
    if batch * rows <= 1:
        return dense
    stride = tensor.stride(1) if rows > 1 else tensor.stride(0)
    if batch > 1 and tensor.stride(0) != rows * stride:
        return None
    return stride if dense <= stride <= LARGEST_STRIDE else None


def in_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a contiguous copy where it has no row stride, and its row stride."""
    stride = row_stride(tensor)
    return (tensor.contiguous(), math.prod(tensor.shape[2:])) if stride is None else (tensor, stride)


@triton.jit
def cell_of(x, y, CANVAS_H, CANVAS_W):
    """Canvas index of the cell that a location rounds to, clamped to the canvas; NaN counts as 0."""
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), 0.0), CANVAS_W - 1.0)
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), 0.0), CANVAS_H - 1.0)
    return ((y + ROUND) - ROUND).to(tl.int32) * CANVAS_W + ((x + ROUND) - ROUND).to(tl.int32)


@triton.jit
def positive(tau):
    """relu that keeps NaN."""
    return tl.where(tau < 0, 0.0, tau)


@triton.jit
def owners(tile):
    """[rows, owners] in the order of `OWNERS_FIRST`."""
    return tl.trans(tile) if OWNERS_FIRST else tile


@triton.jit
def program():
    """Tile, head and image of this program; the image is int64, for it multiplies strides."""
    return tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)


@triton.jit
def gather(VALUE, packed, b, h, N, STRIDE, S: tl.constexpr, D: tl.constexpr, QB: tl.constexpr):
    """Values of the tokens in packed entries [S, 4, QB], fp32 [rows, owners, D] with rows and owners as `owners`; those
    of token 0 where there is no token."""
    token = tl.where(packed != -1, (packed >> 16) & 0xFFFF, 0)
    token = owners(tl.reshape(token, [S * 4, QB]))
    of_head = VALUE + b * N * STRIDE + h * D
    return tl.load(of_head + (token * STRIDE)[:, :, None] + tl.arange(0, D)[None, None, :]).to(tl.float32)


@triton.jit
def sample(
    QUERY_POS,
    OFFSET,
    LOGIT,
    PACKED,
    tau,
    b,
    h,
    q,
    NQ,
    OFFSET_STRIDE,
    LOGIT_STRIDE,
    CANVAS_H,
    CANVAS_W,
    S: tl.constexpr,
):
    """What queries q [QB] of image b and head h read.

    Returns:
        softmax of the logits [S, QB]; softmax of the closeness, distance, direction (x, y) from the token and packed
        entry of the table, each [S, 4, QB]; cell of the sample [S, QB].
    """
    s = tl.arange(0, S)[:, None]
    q = q[None, :]
    # [1, QB] positions of the queries, [S, QB] offsets and logits
    position = QUERY_POS + b * NQ * 2 + q * 2
    offset = OFFSET + b * NQ * OFFSET_STRIDE + h * (S * 2) + q * OFFSET_STRIDE + s * 2
    x = tl.load(position).to(tl.float32) + tl.load(offset).to(tl.float32)
    y = tl.load(position + 1).to(tl.float32) + tl.load(offset + 1).to(tl.float32)
    logit = tl.load(LOGIT + b * NQ * LOGIT_STRIDE + h * S + q * LOGIT_STRIDE + s).to(tl.float32)
    mix = tl.exp(logit - tl.max(logit, 0)[None, :])
    mix = mix / tl.sum(mix, 0)[None, :]
    # [S, 4, QB] nearest tokens of the sample's cell
    cell = cell_of(x, y, CANVAS_H, CANVAS_W)
    k = tl.arange(0, 4)[None, :, None]
    packed = tl.load(PACKED + b * (CANVAS_H * CANVAS_W * 4) + cell[:, None, :] * 4 + k)
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
    return mix, near, distance, from_x * inverse, from_y * inverse, packed, cell
