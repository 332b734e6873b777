"""Adding weighted tiles: one kernel for a whole batch.

A program owns ROWS x COLUMNS pixels of one class of one section and adds the tiles that reach them, in the order of the
batch: no atomics, and the same bits in every run. Bound by memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128
"""Pixels of a program: 16 for each of 128 threads."""


@triton.jit(do_not_specialize=["B", "C", "Y", "X", "T"])
def _blend_kernel(
    SUM, TILE, WEIGHT_Y, WEIGHT_X, ORIGIN, B, C, Y, X, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a rectangle of one plane (section z, class c)."""
    across, down = tl.cdiv(X, COLUMNS), tl.cdiv(Y, ROWS)
    program = tl.program_id(0)
    plane, place = program // (across * down), program % (across * down)
    z, c = plane // C, plane % C
    top, left = (place // across) * ROWS, (place % across) * COLUMNS
    y, x = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)

    # [ROWS, COLUMNS] sums so far
    at = (plane.to(tl.int64) * Y + y)[:, None] * X + x[None, :]
    inside = (y < Y)[:, None] & (x < X)[None, :]
    total = tl.load(SUM + at, mask=inside, other=0.0)

    for b in range(B):
        tile_z, tile_y, tile_x = tl.load(ORIGIN + 3 * b), tl.load(ORIGIN + 3 * b + 1), tl.load(ORIGIN + 3 * b + 2)
        reaches_y = (tile_y < top + ROWS) & (tile_y + T > top)
        reaches_x = (tile_x < left + COLUMNS) & (tile_x + T > left)
        if (tile_z == z) & reaches_y & reaches_x:
            i, j = y - tile_y, x - tile_x
            has_i, has_j = (i >= 0) & (i < T), (j >= 0) & (j < T)
            # [ROWS] and [COLUMNS] weights, [ROWS, COLUMNS] values of the tile
            weight_y = tl.load(WEIGHT_Y + b * T + i, mask=has_i, other=0.0).to(tl.float32)
            weight_x = tl.load(WEIGHT_X + b * T + j, mask=has_j, other=0.0).to(tl.float32)
            first = TILE + (b * C + c).to(tl.int64) * (T * T)
            value = tl.load(first + i[:, None] * T + j[None, :], mask=has_i[:, None] & has_j[None, :], other=0.0)
            total += weight_y[:, None] * weight_x[None, :] * value.to(tl.float32)
    tl.store(SUM + at, total, mask=inside)


def blend_tiles(
    sums_ZCYX: Tensor, tiles_BCTT: Tensor, weight_y_BT: Tensor, weight_x_BT: Tensor, origin_B3: Tensor
) -> None:
    """See the package for the formula and the shapes."""
    sections, classes, height, width = sums_ZCYX.shape
    grid = (sections * classes * triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS),)
    _blend_kernel[grid](
        SUM=sums_ZCYX, TILE=tiles_BCTT.contiguous(), WEIGHT_Y=weight_y_BT.contiguous(),
        WEIGHT_X=weight_x_BT.contiguous(), ORIGIN=origin_B3.contiguous(), B=len(origin_B3), C=classes, Y=height,
        X=width, T=tiles_BCTT.shape[-1], ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
