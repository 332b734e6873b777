"""Bias and activation after a matrix product, in one pass forward and one backward, for the ops that contain an MLP.

    GELU   u = x + b,   y = u Phi(u),   dx = dy (Phi(u) + u phi(u)),   db = sum dx
    ReLU   y = max(0, u) comes from the product itself;   du = dy [y > 0],   db = sum du

Bound by memory traffic: 2 tensors forward, 3 or 4 backward.

Axes: N rows, C channels, R rows and CB channels of a tile, P programs along the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums
from affmae_kernels.gaussian import normal
from affmae_kernels.launch import multiprocessors
from affmae_kernels.side_stream import Run, at_once

ROWS, CHANNELS, WARPS, BACKWARD_WARPS = 16, 128, 4, 8
"""Rows and channels of a tile, warps forward and backward: the fastest of those tried on an H200."""
PROGRAMS_PER_SM = 4
"""Programs of a backward pass per multiprocessor; each leaves its columns' partial sums."""


@triton.jit(do_not_specialize=["N"])  # C is specialized: that it is a multiple of 16 makes loads wide
def _gelu_fwd_kernel(X, BIAS, Y, N, C, R: tl.constexpr, CB: tl.constexpr):
    """One program: one tile of y."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    real = (row < N)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    # [R, CB] + [CB]
    u = tl.load(X + at, mask=real, other=0.0).to(tl.float32) + tl.load(BIAS + c, mask=c < C, other=0.0)[None, :]
    below, _ = normal(u)
    tl.store(Y + at, (u * below).to(Y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N"])
def _gelu_bwd_kernel(DY, X, BIAS, DX, Y, PART, N, C, R: tl.constexpr, CB: tl.constexpr):
    """One program: every P-th tile of rows of CB channels; y again unless Y is None; sums of dx to PART [P, C]."""
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    b = tl.load(BIAS + c, mask=c < C, other=0.0)  # [CB]
    db = tl.zeros([R, CB], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        real = (row < N)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        u = tl.load(X + at, mask=real, other=0.0).to(tl.float32) + b[None, :]  # [R, CB]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)  # [R, CB]
        below, density = normal(u)
        dx = dy * (below + u * density)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
        if Y is not None:
            tl.store(Y + at, (u * below).to(Y.dtype.element_ty), mask=real)
        db += dx
    tl.store(PART + tl.program_id(0).to(tl.int64) * C + c, tl.sum(db, 0), mask=c < C)


@triton.jit(do_not_specialize=["N"])
def _relu_bwd_kernel(DY, Y, DU, PART, N, C, R: tl.constexpr, CB: tl.constexpr):
    """One program: every P-th tile of rows of CB channels; sums of du to PART [P, C]."""
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    db = tl.zeros([R, CB], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        real = (row < N)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        y = tl.load(Y + at, mask=real, other=0.0).to(tl.float32)  # [R, CB]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)  # [R, CB]
        du = tl.where(y <= 0, 0.0, dy)  # NaN stays NaN
        tl.store(DU + at, du.to(DU.dtype.element_ty), mask=real)
        db += du
    tl.store(PART + tl.program_id(0).to(tl.int64) * C + c, tl.sum(db, 0), mask=c < C)


def gelu_forward(x_NC: Tensor, bias_C: Tensor) -> Tensor:
    """GELU(x + bias) of a contiguous matrix and an fp32 bias, in the dtype of x."""
    rows, width = x_NC.shape
    y_NC = torch.empty_like(x_NC)
    _gelu_fwd_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, CHANNELS))](
        X=x_NC, BIAS=bias_C, Y=y_NC, N=rows, C=width, R=ROWS, CB=CHANNELS, num_warps=WARPS
    )
    return y_NC


def gelu_backward(
    dy_NC: Tensor, x_NC: Tensor, bias_C: Tensor, *, recompute: bool, run: Run = at_once
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx, y again if it is to be recomputed, and the fp32 gradient of the bias, summed by `run` (see `side_stream`)."""
    rows, width = x_NC.shape
    dx_NC = torch.empty_like(x_NC)
    y_NC = torch.empty_like(x_NC) if recompute else None
    grid, part = _programs(x_NC)
    _gelu_bwd_kernel[grid](
        DY=dy_NC, X=x_NC, BIAS=bias_C, DX=dx_NC, Y=y_NC, PART=part, N=rows, C=width, R=ROWS, CB=CHANNELS,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dx_NC, y_NC, run(column_sums, part)


def relu_backward(dy_NC: Tensor, y_NC: Tensor, *, run: Run = at_once) -> tuple[Tensor, Tensor]:
    """du and the fp32 gradient of the bias, from y = max(0, u) and its gradient; `run` as above."""
    rows, width = y_NC.shape
    du_NC = torch.empty_like(y_NC)
    grid, part = _programs(y_NC)
    _relu_bwd_kernel[grid](
        DY=dy_NC, Y=y_NC, DU=du_NC, PART=part, N=rows, C=width, R=ROWS, CB=CHANNELS, num_warps=BACKWARD_WARPS
    )
    return du_NC, run(column_sums, part)


def _programs(x_NC: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Grid of a backward pass, and room for its partial sums."""
    rows, width = x_NC.shape
    blocks = triton.cdiv(width, CHANNELS)
    most = PROGRAMS_PER_SM * multiprocessors(x_NC.device)
    programs = min(triton.cdiv(most, blocks), triton.cdiv(rows, ROWS))
    return (programs, blocks), torch.empty(programs, width, dtype=torch.float32, device=x_NC.device)
