"""Sums over rows, in fp32 and in a fixed order: gradients of biases, and what a backward kernel's programs left.

PyTorch's own sum takes 10 us and more for a few hundred rows of partial sums, which a step has a hundred times. Here a
program loads 16 or 64 columns of many rows at once; what is too much for one launch takes two.

Axes: N rows, M columns, P parts of the rows, RB rows and CB columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""Aimed at in the first of two passes: some waves on a large card."""
ONE_PASS = 2112
"""Most rows of fp32 that are summed by one launch."""


@triton.jit(do_not_specialize=["N", "ROWS"])  # that M is a multiple of 16 makes loads wide
def _column_sums_kernel(X, OUT, N, M, stride, ROWS, RB: tl.constexpr, CB: tl.constexpr):
    """One program: CB columns of ROWS rows of X [N, M], into row p of OUT [P, M]."""
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    column = tl.program_id(1) * CB + tl.arange(0, CB)
    total = tl.zeros([RB, CB], tl.float32)
    for r0 in range(first, last, RB):
        row = (r0 + tl.arange(0, RB)).to(tl.int64)
        real = (row < last)[:, None] & (column < M)[None, :]
        total += tl.load(X + row[:, None] * stride + column[None, :], mask=real, other=0.0).to(tl.float32)  # [RB, CB]
    tl.store(OUT + tl.program_id(0).to(tl.int64) * M + column, tl.sum(total, 0), mask=column < M)


def launch_config(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Rows (RB) and columns (CB) of a tile: lines of 64 bytes of fp32 sums, of 128 bytes of half precision.

    Partial sums of up to `ONE_PASS` rows are few enough for one program per line of columns, with many loads under
    way: a second launch would cost as much as the whole sum.
    """
    if dtype != torch.float32:
        return {"RB": 64, "CB": 64, "num_warps": 4}
    return {"RB": 512, "CB": 16, "num_warps": 16} if 256 < rows <= ONE_PASS else {"RB": 128, "CB": 16, "num_warps": 4}


def column_sums(x_NM: Tensor) -> Tensor:
    """Sum over the rows of a floating [N, M] on a device that runs Triton kernels: fp32 [M].

    Rows may be strided (a slice of the columns of a wider matrix); columns are dense.
    """
    rows, columns = x_NM.shape
    config = launch_config(x_NM.dtype, rows)
    blocks = triton.cdiv(columns, config["CB"])
    tile = config["RB"]
    each = rows
    if rows > ONE_PASS or (x_NM.dtype != torch.float32 and rows > 2 * tile):
        each = triton.cdiv(triton.cdiv(rows, max(1, PROGRAMS // blocks)), tile) * tile
    parts = triton.cdiv(rows, each)
    out_PM = torch.empty(parts, columns, dtype=torch.float32, device=x_NM.device)
    _column_sums_kernel[(parts, blocks)](
        X=x_NM, OUT=out_PM, N=rows, M=columns, stride=x_NM.stride(0), ROWS=each, **config
    )
    return out_PM.view(columns) if parts == 1 else column_sums(out_PM)
