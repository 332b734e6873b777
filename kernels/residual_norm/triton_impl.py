"""Residual LayerNorm in one pass forward and one backward.

    s = x + keep * branch / (1 - p),   h = (s - mean) / sqrt(var + eps),   y = w h + b

What is unusual: the dropout's mask is never stored. Element i of a call hashes to the same number in both passes, from
a seed that is a tensor on the device, so that a recorded step draws anew at each replay. Saved: s and the seed.
Bound by memory traffic: 4 tensors forward (x, branch, s, y), 4 backward (dy, s, dx, dbranch).

Axes: N rows, C channels, R rows of a tile, CP channels padded to a power of two, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROGRAMS = 1024
"""Of the backward pass; each leaves one row of partial sums for the gradients of w and b."""


@triton.jit
def _kept(SEED, row, c, C: tl.constexpr, DROP: tl.constexpr):
    """Which elements of a tile dropout keeps.

    A 32-bit mixing function of the element's number (constants of C. Wellons' hash prospector, bias 0.107) with the
    seed before and between its rounds: nine instructions, where Philox costs more than the rest of the kernel.
    """
    seed = tl.load(SEED).to(tl.uint32)
    mixed = (row[:, None] * C + c[None, :]).to(tl.uint32) ^ seed
    mixed = (mixed ^ (mixed >> 16)) * 0x21F0AAAD + seed
    mixed = (mixed ^ (mixed >> 15)) * 0x735A2D97
    return ((mixed ^ (mixed >> 15)) >> 8).to(tl.float32) >= DROP * 2**24


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    X, BRANCH, WEIGHT, BIAS, SEED, SUM, Y, N, eps,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program: R rows of s and y."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, CP)
    real = (row < N)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    branch = tl.load(BRANCH + at, mask=real, other=0.0).to(tl.float32)
    if DROP > 0:
        branch = tl.where(_kept(SEED, row, c, C, DROP), branch * (1 / (1 - DROP)), 0.0)
    rounded = (x + branch).to(SUM.dtype.element_ty)
    tl.store(SUM + at, rounded, mask=real)
    s = rounded.to(tl.float32)
    centred = tl.where(real, s - (tl.sum(s, 1) / C)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0)
    b = tl.load(BIAS + c, mask=c < C, other=0.0)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    DY, SUM, WEIGHT, SEED, DX, DBRANCH, PART, N, eps,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program: every P-th tile of rows. With g = w dy

        dx = rstd (g - mean(g) - h mean(g h)),   dbranch = keep * dx / (1 - p),   dw = sum dy h,   db = sum dy

    Partial sums of dw and db go to PART [P, 2, C].
    """
    c = tl.arange(0, CP)
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0)
    dw = tl.zeros([R, CP], tl.float32)  # summed over rows only at the end: that crosses warps
    db = tl.zeros([R, CP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        real = (row < N)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        s = tl.load(SUM + at, mask=real, other=0.0).to(tl.float32)
        centred = tl.where(real, s - (tl.sum(s, 1) / C)[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        h = centred * rstd[:, None]
        dw += dy * h
        db += dy
        g = dy * w[None, :]
        mean_g = tl.sum(g, 1) / C
        mean_gh = tl.sum(g * h, 1) / C
        dx = rstd[:, None] * (g - mean_g[:, None] - h * mean_gh[:, None])
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
        if DROP > 0:
            dbranch = tl.where(_kept(SEED, row, c, C, DROP), dx * (1 / (1 - DROP)), 0.0)
            tl.store(DBRANCH + at, dbranch.to(DBRANCH.dtype.element_ty), mask=real)
    part = PART + tl.program_id(0) * 2 * C + c
    tl.store(part, tl.sum(dw, 0), mask=c < C)
    tl.store(part + C, tl.sum(db, 0), mask=c < C)


def launch_options(width: int) -> dict[str, int]:
    """Rows of a tile (R), padded channels (CP) and warps: 16 elements a thread, in whole rows."""
    padded = triton.next_power_of_2(width)
    return {"CP": padded, "R": max(1, 2048 // padded), "num_warps": 4}


@torch.library.custom_op("affmae::residual_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, dropout: float, eps: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    total, y = torch.empty_like(x), torch.empty_like(x)
    options = launch_options(width)
    grid = (triton.cdiv(rows, options["R"]),)
    _forward_kernel[grid](x, branch, weight, bias, seed, total, y, rows, eps, C=width, DROP=dropout, **options)
    return y, total


@_forward.register_fake
def _(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, dropout: float, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("affmae::residual_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, total: Tensor, weight: Tensor, seed: Tensor, dropout: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = total.shape[-1]
    rows = total.numel() // width
    dx = torch.empty_like(total)
    dbranch = torch.empty_like(total) if dropout else total.new_empty(0)
    options = launch_options(width)
    programs = min(MOST_PROGRAMS, triton.cdiv(rows, options["R"]))
    part = torch.empty(programs, 2, width, dtype=torch.float32, device=total.device)
    _backward_kernel[(programs,)](
        dy.contiguous(), total, weight, seed, dx, dbranch, part, rows, eps, C=width, DROP=dropout, **options
    )
    dweight, dbias = part.sum(0).unbind(0)
    return dx, dbranch, dweight.clone(), dbias.clone()  # an operator's results share no memory


@_backward.register_fake
def _(
    dy: Tensor, total: Tensor, weight: Tensor, seed: Tensor, dropout: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbranch = torch.empty_like(total) if dropout else total.new_empty(0)
    return torch.empty_like(total), dbranch, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, _, seed, dropout, eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, seed)
    ctx.dropout, ctx.eps = dropout, eps


def _differentiate(ctx: Any, dy: Tensor, dtotal: None) -> tuple[Tensor | None, ...]:
    dx, dbranch, dweight, dbias = _backward(dy, *ctx.saved_tensors, ctx.dropout, ctx.eps)
    return dx, dbranch if ctx.dropout else dx, dweight, dbias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def residual_norm(
    x_NC: Tensor, branch_NC: Tensor, weight_C: Tensor, bias_C: Tensor, dropout: float, eps: float
) -> Tensor:
    """See the package for the formula and the shapes."""
    if dropout:
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x_NC.device)
    else:
        seed = torch.zeros(1, dtype=torch.int32, device=x_NC.device)
    weight_C, bias_C = weight_C.float().contiguous(), bias_C.float().contiguous()
    y_NC, _ = _forward(x_NC.contiguous(), branch_NC.contiguous(), weight_C, bias_C, seed, dropout, eps)
    return y_NC
