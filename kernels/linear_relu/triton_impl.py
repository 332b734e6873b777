"""A linear layer and its ReLU: the product with bias and ReLU as one call of cuBLAS, and one pass for the gradients.

    y = max(0, x W^T + b),   du = dy [y > 0],   dx = du W,   dW = du^T x,   db = sum du

What is unusual: neither a mask nor what was there before the ReLU is kept, since y tells where it was positive; and
the bias's gradient is summed in the pass that writes du. Bound by memory traffic: 3 tensors of hidden width backward.

Axes: R rows, C channels, H hidden channels, RB rows and CB channels of a tile, P programs along the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums
from affmae_kernels.products import weight_gradient

RB, CB, WARPS = 8, 128, 4
"""Rows and channels of a tile, warps: those of GELU's backward pass, whose traffic is the same."""
PROGRAMS = 1056
"""8 for each of 132 multiprocessors; each leaves its columns' partial sums."""


@triton.jit(do_not_specialize=["N"])
def _relu_backward_kernel(DY, Y, DU, PART, N, H, RB: tl.constexpr, CB: tl.constexpr):
    """One program: every P-th tile of rows of CB channels; the sums of du go to PART [P, H]."""
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    db = tl.zeros([RB, CB], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, RB), tl.num_programs(0)):
        row = (tile * RB + tl.arange(0, RB)).to(tl.int64)
        real = (row < N)[:, None] & (c < H)[None, :]
        at = row[:, None] * H + c[None, :]
        y = tl.load(Y + at, mask=real, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        du = tl.where(y <= 0, 0.0, dy)  # not a number stays one
        tl.store(DU + at, du.to(DU.dtype.element_ty), mask=real)
        db += du
    tl.store(PART + tl.program_id(0).to(tl.int64) * H + c, tl.sum(db, 0), mask=c < H)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@torch.library.custom_op("affmae::linear_relu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch._addmm_activation(bias.to(x.dtype), _rows(x), weight.to(x.dtype).t())
    return y.view(*x.shape[:-1], len(bias))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(bias))


@torch.library.custom_op("affmae::linear_relu_backward", mutates_args=())
def _backward(dy: Tensor, y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, y = _rows(dy).contiguous(), _rows(y)
    rows, hidden = y.shape
    blocks = triton.cdiv(hidden, CB)
    programs = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(rows, RB))
    du = torch.empty_like(y)
    part = torch.empty(programs, hidden, dtype=torch.float32, device=y.device)
    _relu_backward_kernel[(programs, blocks)](dy, y, du, part, rows, hidden, RB=RB, CB=CB, num_warps=WARPS)
    dweight = weight_gradient(du, _rows(x)).to(weight.dtype)
    return (du @ weight.to(du.dtype)).view_as(x), dweight, column_sums(part)


@_backward.register_fake
def _(dy: Tensor, y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(output, x, weight)
    ctx.bias_dtype = bias.dtype


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward(dy, *ctx.saved_tensors)
    return dx, dweight, dbias.to(ctx.bias_dtype)


_forward.register_autograd(_differentiate, setup_context=_keep)


def linear_relu(x_BNC: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    y_BNH: Tensor = _forward(x_BNC.contiguous(), weight_HC.contiguous(), bias_H.contiguous())
    return y_BNH
