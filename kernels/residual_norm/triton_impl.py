"""Residual LayerNorm in one pass forward and one backward.

    s = x + scale_b keep (branch + offset) / (1 - p),   h = (s - mean) rstd,   y = w h + b

What is unusual: the dropout's mask is never stored. Element i of a call hashes to the same number in both passes, from
a seed that is a tensor on the device, so that a recorded step draws anew at each replay. Saved: s, and mean and rstd
of each row. The backward pass adds the gradient that reaches s from elsewhere, sums the gradient of the offset (the
bias of the linear layer that made the branch), and can write y again for whoever did not keep it.
Bound by memory traffic: 4 tensors forward (x, branch, s, y), up to 6 backward (dy, ds, s, dx, dbranch, y).

Axes: N rows, C channels, R rows of a tile, CP channels padded to a power of two, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums

PROGRAMS = 1056, 2112
"""Fewest and most of the backward pass, where there are rows enough: 8 and 16 for each of 132 multiprocessors. Each
leaves one row of partial sums."""


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


@triton.jit(do_not_specialize=["N", "PER"])
def _norm_forward_kernel(
    X, BRANCH, OFFSET, WEIGHT, BIAS, SEED, SCALE, SUM, Y, STAT, N, PER, eps,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    BRANCHED: tl.constexpr, MOVED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program: R rows of s, y, and (mean, rstd) in STAT [N, 2]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, CP)
    real = (row < N)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    s = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    if BRANCHED:
        branch = tl.load(BRANCH + at, mask=real, other=0.0).to(tl.float32)
        if MOVED:
            branch += tl.load(OFFSET + c, mask=c < C, other=0.0)[None, :]
        if DROP > 0:
            branch = tl.where(_kept(SEED, row, c, C, DROP), branch * (1 / (1 - DROP)), 0.0)
        if SCALED:
            branch *= tl.load(SCALE + row // PER, mask=row < N, other=0.0)[:, None]
        rounded = (s + branch).to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=real)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 1) / C
    centred = tl.where(real, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(STAT + row * 2, mean, mask=row < N)
    tl.store(STAT + row * 2 + 1, rstd, mask=row < N)
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0)
    b = tl.load(BIAS + c, mask=c < C, other=0.0)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N", "PER"])
def _norm_backward_kernel(
    DY, DS, SUM, STAT, WEIGHT, BIAS, SEED, SCALE, DX, DBRANCH, Y, PART, N, PER,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    ADDED: tl.constexpr, MOVED: tl.constexpr, SCALED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One program: every P-th tile of rows. With g = w dy

        dx = ds + rstd (g - mean(g) - h mean(g h)),   dbranch = scale_b keep dx / (1 - p)
        dw = sum dy h,   db = sum dy,   doffset = sum dbranch

    Partial sums of dw, db and doffset go to PART [P, 3, C] (without offset [P, 2, C]).
    """
    c = tl.arange(0, CP)
    inside = c < C
    w = tl.load(WEIGHT + c, mask=inside, other=0.0)
    dw = tl.zeros([R, CP], tl.float32)  # summed over rows only at the end: that crosses warps
    db = tl.zeros([R, CP], tl.float32)
    doffset = tl.zeros([R, CP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        real = (row < N)[:, None] & inside[None, :]
        at = row[:, None] * C + c[None, :]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        s = tl.load(SUM + at, mask=real, other=0.0).to(tl.float32)
        mean = tl.load(STAT + row * 2, mask=row < N, other=0.0)
        rstd = tl.load(STAT + row * 2 + 1, mask=row < N, other=0.0)
        h = (s - mean[:, None]) * rstd[:, None]  # beyond C and N every factor that meets it is 0
        dw += dy * h
        db += dy
        g = dy * w[None, :]
        mean_g = tl.sum(g, 1) / C
        mean_gh = tl.sum(g * h, 1) / C
        dx = rstd[:, None] * (g - mean_g[:, None] - h * mean_gh[:, None])
        if ADDED:
            dx += tl.load(DS + at, mask=real, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
        if AGAIN:
            b = tl.load(BIAS + c, mask=inside, other=0.0)
            tl.store(Y + at, (h * w[None, :] + b[None, :]).to(Y.dtype.element_ty), mask=real)
        if DROP > 0:
            dx = tl.where(_kept(SEED, row, c, C, DROP), dx * (1 / (1 - DROP)), 0.0)
        if SCALED:
            dx *= tl.load(SCALE + row // PER, mask=row < N, other=0.0)[:, None]
        if SCALED or DROP > 0:
            tl.store(DBRANCH + at, dx.to(DBRANCH.dtype.element_ty), mask=real)
        if MOVED:
            doffset += tl.where(real, dx, 0.0)
    part = PART + tl.program_id(0).to(tl.int64) * ((3 if MOVED else 2) * C) + c
    tl.store(part, tl.sum(dw, 0), mask=inside)
    tl.store(part + C, tl.sum(db, 0), mask=inside)
    if MOVED:
        tl.store(part + 2 * C, tl.sum(doffset, 0), mask=inside)


def launch_options(width: int, *, backward: bool = False) -> dict[str, int]:
    """Rows of a tile (R), padded channels (CP) and warps: 16 elements a thread, in whole rows. Backward a row's sums
    stay within one warp: barriers in every turn of the loop cost more than anything else there."""
    padded = triton.next_power_of_2(width)
    warps = 1 if backward else 4
    return {"CP": padded, "R": max(1, 512 * warps // padded), "num_warps": warps}


def _or_seed(tensor: Tensor | None, seed: Tensor) -> Tensor:
    """An argument that the kernel will not read stands for one that is not there."""
    return seed if tensor is None else tensor


def launch_forward(
    x: Tensor, branch: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, s and the statistics (fp32 [N, 2]); s is `x` itself where there is no branch.

    All tensors are contiguous; weight, bias, offset and scale (one number per entry of the first axis) are fp32.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    total = torch.empty_like(x) if branch is not None else x
    stat = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    options = launch_options(width)
    _norm_forward_kernel[(triton.cdiv(rows, options["R"]),)](
        x, x if branch is None else branch, _or_seed(offset, seed), weight, bias, seed, _or_seed(scale, seed), total,
        y, stat, rows, rows // x.shape[0], eps, C=width, DROP=dropout, BRANCHED=branch is not None,
        MOVED=offset is not None, SCALED=scale is not None, **options,
    )  # fmt: skip
    return y, total, stat


def launch_backward(
    dy: Tensor, ds: Tensor | None, total: Tensor, stat: Tensor, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, *, moved: bool, again: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dx, dbranch (dx itself where neither dropout nor scale tell them apart), y if it is asked for `again`, and the
    sums dw, db and (if the branch was `moved` by an offset) doffset as fp32 [2 or 3, C]."""
    width = total.shape[-1]
    rows = total.numel() // width
    dx = torch.empty_like(total)
    dbranch = torch.empty_like(total) if dropout or scale is not None else dx
    y = torch.empty_like(total) if again else None
    options = launch_options(width, backward=True)
    tiles, (fewest, most) = triton.cdiv(rows, options["R"]), PROGRAMS
    programs = min(tiles, most, max(fewest, tiles // 8))
    part = torch.empty(programs, (3 if moved else 2) * width, dtype=torch.float32, device=total.device)
    _norm_backward_kernel[(programs,)](
        dy, dy if ds is None else ds, total, stat, weight, bias, seed, _or_seed(scale, seed), dx, dbranch,
        dx if y is None else y, part, rows, rows // total.shape[0], C=width, DROP=dropout, ADDED=ds is not None,
        MOVED=moved, SCALED=scale is not None, AGAIN=again, **options,
    )  # fmt: skip
    return dx, dbranch, y, column_sums(part).view(-1, width)


@torch.library.custom_op("affmae::residual_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_forward(x, branch, offset, weight, bias, seed, scale, dropout, eps)


@_forward.register_fake
def _(
    x: Tensor, branch: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stat = x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), stat


@torch.library.custom_op("affmae::residual_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, ds: Tensor | None, total: Tensor, stat: Tensor, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, moved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ds = None if ds is None else ds.contiguous()
    dx, dbranch, _, sums = launch_backward(
        dy.contiguous(), ds, total, stat, weight, bias, seed, scale, dropout, moved=moved
    )
    # An operator's results share no memory.
    dbranch = dbranch if dbranch is not dx else dx.new_empty(0)
    return dx, dbranch, sums[0].clone(), sums[1].clone(), sums[2].clone() if moved else sums.new_empty(0)


@_backward.register_fake
def _(
    dy: Tensor, ds: Tensor | None, total: Tensor, stat: Tensor, weight: Tensor, bias: Tensor, seed: Tensor,
    scale: Tensor | None, dropout: float, moved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbranch = torch.empty_like(total) if dropout or scale is not None else total.new_empty(0)
    doffset = torch.empty_like(weight) if moved else weight.new_empty(0)
    return torch.empty_like(total), dbranch, torch.empty_like(weight), torch.empty_like(weight), doffset


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, offset, weight, bias, seed, scale, dropout, _ = inputs
    _, total, stat = output
    ctx.mark_non_differentiable(stat)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, stat, weight, bias, seed, scale)
    ctx.dropout, ctx.moved = dropout, offset is not None


def _differentiate(ctx: Any, dy: Tensor | None, ds: Tensor | None, dstat: None) -> tuple[Tensor | None, ...]:
    total, stat, weight, bias, seed, scale = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy
    dx, dbranch, dweight, dbias, doffset = _backward(
        dy, ds, total, stat, weight, bias, seed, scale, ctx.dropout, ctx.moved
    )
    told_apart = bool(ctx.dropout) or scale is not None
    return dx, dbranch if told_apart else dx, doffset if ctx.moved else None, dweight, dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def residual_norm(
    x_BNC: Tensor,
    branch_BNC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    offset_C: Tensor | None,
    scale_B: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See the package for the formula and the shapes."""
    if dropout:
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x_BNC.device)
    else:
        seed = torch.zeros(1, dtype=torch.int32, device=x_BNC.device)
    offset_C = None if offset_C is None else offset_C.float().contiguous()
    scale_B = None if scale_B is None else scale_B.float().contiguous()
    weight_C, bias_C = weight_C.float().contiguous(), bias_C.float().contiguous()
    y_BNC, sum_BNC, _ = _forward(
        x_BNC.contiguous(), branch_BNC.contiguous(), offset_C, weight_C, bias_C, seed, scale_B, dropout, eps
    )
    return y_BNC, sum_BNC
