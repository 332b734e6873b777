"""What the forward and the backward kernels of cluster attention share: their launch, and what a pair contributes.

Axes: G groups, A heads, HB heads of a program, R = 16 rows of a group, J columns of a tile, D head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods.walks import GROUP

Pass = Literal["forward", "query", "key"]
"""The forward pass, the gradient of the queries, that of keys and values."""
SIZES = ["N", "ENTRIES", "GROUPS", "A"]
"""Differ from stage to stage; one compilation serves all."""


def launch_options(heads: int, width: int, dtype: torch.dtype, kernel: Pass) -> dict[str, int]:
    """Heads of a program (HB), clusters of a tile (TILE), warps, pipeline depth, and a limit on registers.

    The fastest of some 150 that were measured on an H100 at the base network's stages. What counts is how many warps a
    multiprocessor holds: two heads of width 32 and one warp. The query gradient would take 230 registers; held to 184
    it is a tenth faster and spills none. fp32 products run on the ordinary units and need registers.
    """
    if dtype == torch.float32:
        return {"HB": 1, "TILE": 2, "num_warps": 4 if width == 64 else 2, "num_stages": 1}
    together = 2 if heads % 2 == 0 and width <= 32 else 1
    if kernel == "forward":
        return {"HB": together, "TILE": 4, "num_warps": 1, "num_stages": 3}
    options = {"HB": together, "TILE": 2, "num_warps": 1, "num_stages": 2}
    return options | {"maxnreg": 184} if kernel == "query" and together == 2 and width == 32 else options


def launch(
    qkv: Tensor, entry: Tensor, count: Tensor, kernel: Pass
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, trailing arguments and constants of one of the three kernels."""
    _, tokens, _, heads, width = qkv.shape
    options = launch_options(heads, width, qkv.dtype, kernel)
    grid = (count.numel() * (heads // options["HB"]),)
    sizes = (width**-0.5, tokens, entry.shape[2], count.shape[1], heads)
    constants = {"R": GROUP, "D": width, "PREC": precision_of(qkv.dtype), "STAGES": options["num_stages"]}
    return grid, sizes, constants | options


@triton.jit
def read_columns(ENTRY, e0, count, N, TILE: tl.constexpr):
    """Rows (clamped into the image) and membership bits of the members of TILE listed clusters."""
    j = tl.arange(0, TILE * 8)
    slot = e0 + j // 8
    entry = tl.load(ENTRY + slot, mask=slot < count, other=0)
    row = (entry >> 16) * 8 + j % 8
    bits = tl.where(row < N, entry & 0xFFFF, 0)  # a short last cluster has no such member
    return tl.minimum(row, N - 1), bits


@triton.jit
def geometry(x_R, y_R, x_J, y_J, member_RJ, SIGN: tl.constexpr):
    """0 or -1e30 for (non-)members, then dx, dy, d, dy/d, dx/d from query to key, each [1, R, J].

    SIGN: 1 when the rows are queries, -1 when they are keys. Distances are 0 or at least 1, so the lower bound only
    keeps rsqrt finite at 0, where dx and dy make d and both ratios exactly 0.
    """
    dx = (x_J[None, :] - x_R[:, None]) * SIGN
    dy = (y_J[None, :] - y_R[:, None]) * SIGN
    square = dx * dx + dy * dy
    inverse = tl.rsqrt(tl.maximum(square, 0.5))
    offset = tl.where(member_RJ, 0.0, -1e30)
    return offset[None], dx[None], dy[None], (square * inverse)[None], (dy * inverse)[None], (dx * inverse)[None]


@triton.jit
def load_bias(WEIGHT, BIAS, heads, inverse_scale):
    """w / scale, five of [HB, 1, 1], and c / scale, [HB, 1]."""
    p = WEIGHT + heads * 5
    w0 = (tl.load(p) * inverse_scale)[:, None, None]
    w1 = (tl.load(p + 1) * inverse_scale)[:, None, None]
    w2 = (tl.load(p + 2) * inverse_scale)[:, None, None]
    w3 = (tl.load(p + 3) * inverse_scale)[:, None, None]
    w4 = (tl.load(p + 4) * inverse_scale)[:, None, None]
    return w0, w1, w2, w3, w4, (tl.load(BIAS + heads) * inverse_scale)[:, None]
