"""GELU after a bias: one pass forward, one backward with the bias's gradient.

    u = x + b,   y = u Phi(u),   dx = dy (Phi(u) + u phi(u)),   db = sum dx

What is unusual: Phi comes from Abramowitz and Stegun 7.1.26 (error below 1.5e-7, that of fp32), whose exponential is
the one of phi; the library's erf costs twice the instructions. The backward pass can write y again, so that nobody
needs to keep it. Bound by memory traffic: 2 tensors forward, 3 or 4 backward.

Axes: N rows, C channels, RB rows and CB channels of a tile, P programs along the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums

RB, BACKWARD_RB, CB, WARPS = 16, 8, 128, 4
"""Rows of a tile forward and backward, channels, warps: the fastest of those tried on an H200."""
PROGRAMS = 1056
"""Of the backward pass, 8 for each of 132 multiprocessors; each leaves its columns' partial sums."""


@triton.jit
def _normal(u):
    """(Phi(u), phi(u)): the standard normal distribution and its density."""
    density = tl.exp2(u * u * -0.7213475204444817)
    t = 1 / (1 + 0.23164189 * tl.abs(u))  # 0.3275911 / sqrt(2)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = tail * density
    return tl.where(u > 0, 1 - tail, tail), density * 0.3989422804014327


@triton.jit(do_not_specialize=["N"])  # that C is a multiple of 16 makes loads wide
def _gelu_forward_kernel(X, BIAS, Y, N, C, RB: tl.constexpr, CB: tl.constexpr):
    """One program: one tile of y."""
    row = (tl.program_id(0) * RB + tl.arange(0, RB)).to(tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    real = (row < N)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    u = tl.load(X + at, mask=real, other=0.0).to(tl.float32) + tl.load(BIAS + c, mask=c < C, other=0.0)[None, :]
    below, _ = _normal(u)
    tl.store(Y + at, (u * below).to(Y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N"])
def _gelu_backward_kernel(DY, X, BIAS, DX, Y, PART, N, C, RB: tl.constexpr, CB: tl.constexpr, AGAIN: tl.constexpr):
    """One program: every P-th tile of rows of CB channels; the sums of dx go to PART [P, C]."""
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    b = tl.load(BIAS + c, mask=c < C, other=0.0)
    db = tl.zeros([RB, CB], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, RB), tl.num_programs(0)):
        row = (tile * RB + tl.arange(0, RB)).to(tl.int64)
        real = (row < N)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        u = tl.load(X + at, mask=real, other=0.0).to(tl.float32) + b[None, :]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        below, density = _normal(u)
        dx = dy * (below + u * density)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
        if AGAIN:
            tl.store(Y + at, (u * below).to(Y.dtype.element_ty), mask=real)
        db += dx
    tl.store(PART + tl.program_id(0).to(tl.int64) * C + c, tl.sum(db, 0), mask=c < C)


def launch_forward(x: Tensor, bias: Tensor) -> Tensor:
    """y of a contiguous x [..., C] and an fp32 bias [C]."""
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    _gelu_forward_kernel[(triton.cdiv(rows, RB), triton.cdiv(width, CB))](
        x, bias, y, rows, width, RB=RB, CB=CB, num_warps=WARPS
    )
    return y


def launch_backward(dy: Tensor, x: Tensor, bias: Tensor, *, again: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx, y if it is asked for `again`, and the bias's gradient (fp32)."""
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty_like(x)
    y = torch.empty_like(x) if again else None
    blocks = triton.cdiv(width, CB)
    programs = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(rows, BACKWARD_RB))
    part = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _gelu_backward_kernel[(programs, blocks)](
        dy, x, bias, dx, dx if y is None else y, part, rows, width, RB=BACKWARD_RB, CB=CB, AGAIN=again, num_warps=WARPS,
    )  # fmt: skip
    return dx, y, column_sums(part)


@torch.library.custom_op("affmae::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    return launch_forward(x, bias)


@_forward.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("affmae::bias_gelu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dbias = launch_backward(dy.contiguous(), x, bias, again=False)
    return dx, dbias


@_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = _backward(dy, *ctx.saved_tensors)
    return dx, dbias


_forward.register_autograd(_differentiate, setup_context=_keep)


def bias_gelu(x_BNC: Tensor, bias_C: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    y_BNC: Tensor = _forward(x_BNC.contiguous(), bias_C.float().contiguous())
    return y_BNC
