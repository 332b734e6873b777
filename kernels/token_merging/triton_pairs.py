"""What the forward and the backward kernels of token merging share: their launch, and the weights of a pair.

Axes: R = 16 rows of a group, J columns of a tile. PARAMETERS is [4, 8]: per weight c the five factors of the geometry,
the bias, and the LayerNorm's weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods.walks import GROUP

SIZES = ["N", "K", "ENTRIES", "GROUPS"]
"""Not C: that it is a multiple of 16 makes loads wide."""
EPS = tl.constexpr(1e-5)


def launch_options(dtype: torch.dtype, *, weight_gradient: bool = False) -> dict[str, int]:
    """Clusters of a tile, channels of a block, warps. fp32 products run on the ordinary units and need registers.
    The weights' gradient walks all channels itself: in longer strides a fifth faster on an H100."""
    if dtype == torch.float32:
        return {"TILE": 2, "CB": 32, "num_warps": 4, "num_stages": 1}
    return {"TILE": 4, "CB": 128 if weight_gradient else 64, "num_warps": 4, "num_stages": 1}


def constants_of(dtype: torch.dtype, *, weight_gradient: bool = False) -> dict[str, Any]:
    """Compile-time constants of a launch, its options included."""
    options = launch_options(dtype, weight_gradient=weight_gradient)
    return {"R": GROUP, "PREC": precision_of(dtype)} | options


@triton.jit
def read_columns(ENTRY, e0, count, SIZE, TILE: tl.constexpr):
    """Rows (clamped) and membership bits of the members of TILE listed clusters."""
    j = tl.arange(0, TILE * 8)
    entry = tl.load(ENTRY + e0 + j // 8, mask=e0 + j // 8 < count, other=0)
    row = (entry >> 16) * 8 + j % 8
    return tl.minimum(row, SIZE - 1), tl.where(row < SIZE, entry & 0xFFFF, 0)


@triton.jit
def geometry(dx, dy):
    """(d, dy/d, dx/d); distances are 0 or at least 1, so the bound only keeps rsqrt finite at 0."""
    square = dx * dx + dy * dy
    inverse = tl.rsqrt(tl.maximum(square, 0.5))
    return square * inverse, dy * inverse, dx * inverse


@triton.jit
def _raw(PARAMETERS, c: tl.constexpr, dx, dy, d, ry, rx):
    """The linear layer's output c for every pair."""
    p = PARAMETERS + c * 8
    near = tl.load(p) * dx + tl.load(p + 1) * dy + tl.load(p + 2) * d
    return near + tl.load(p + 3) * ry + tl.load(p + 4) * rx + tl.load(p + 5)


@triton.jit
def normalised(PARAMETERS, dx, dy):
    """The linear layer's four outputs after LayerNorm without its affine part, and 1 / standard deviation."""
    d, ry, rx = geometry(dx, dy)
    a0 = _raw(PARAMETERS, 0, dx, dy, d, ry, rx)
    a1 = _raw(PARAMETERS, 1, dx, dy, d, ry, rx)
    a2 = _raw(PARAMETERS, 2, dx, dy, d, ry, rx)
    a3 = _raw(PARAMETERS, 3, dx, dy, d, ry, rx)
    mean = (a0 + a1 + a2 + a3) * 0.25
    a0, a1, a2, a3 = a0 - mean, a1 - mean, a2 - mean, a3 - mean
    rstd = 1 / tl.sqrt((a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3) * 0.25 + EPS)
    return a0 * rstd, a1 * rstd, a2 * rstd, a3 * rstd, rstd


@triton.jit
def weight_of(PARAMETERS, c: tl.constexpr, h):
    """GELU of the LayerNorm's output c."""
    u = h * tl.load(PARAMETERS + c * 8 + 6) + tl.load(PARAMETERS + c * 8 + 7)
    return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def weight_gradient_of(PARAMETERS, c: tl.constexpr, h, dg):
    """Gradient before GELU (its sums are those of the LayerNorm's weight and bias), and of h."""
    scale = tl.load(PARAMETERS + c * 8 + 6)
    u = h * scale + tl.load(PARAMETERS + c * 8 + 7)
    slope = 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    du = dg * slope
    return du, du * scale
