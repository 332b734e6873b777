"""Residual LayerNorm in one pass forward and one backward.

    s = x + scale_b keep (branch + offset) / (1 - p),   h = (s - mean) rstd,   y = w h + b + code[cell]

Notable: the dropout mask is never stored. Both passes hash the element's index with a seed that lives on the device, so
a recorded step draws a new mask at every replay. Saved are s and the mean and rstd of each row; the backward pass can
write y again for a caller that did not keep it. Every pointer except X, WEIGHT and BIAS may be None; what is None is
compiled away. Bound by memory traffic: up to 4 tensors forward (x, branch, s, y) and 6 backward (dy, ds, s, dx,
dbranch, y).

Axes: N rows, C channels, R rows of a tile, CP channels padded to a power of two, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.launch import multiprocessors
from affmae_kernels.side_stream import Run, at_once

EPS = 1e-5
PROGRAMS_PER_SM = 8
"""Most programs of the backward pass per multiprocessor; each leaves one row of partial sums."""


@triton.jit
def _kept(SEED, salt, row, c, C: tl.constexpr, DROP: tl.constexpr):
    """Which elements of a tile dropout keeps.

    A 32-bit mixing function of the element's index (constants of C. Wellons' hash prospector, bias 0.107) with the
    seed before and between its rounds: nine instructions, where Philox would cost more than the rest of the kernel.
    """
    seed = tl.load(SEED + salt).to(tl.uint32)
    mixed = (row[:, None] * C + c[None, :]).to(tl.uint32) ^ seed
    mixed = (mixed ^ (mixed >> 16)) * 0x21F0AAAD + seed
    mixed = (mixed ^ (mixed >> 15)) * 0x735A2D97
    return ((mixed ^ (mixed >> 15)) >> 8).to(tl.float32) >= DROP * 2**24


@triton.jit(do_not_specialize=["N", "PER", "salt"])
def _norm_fwd_kernel(
    X, BRANCH, OFFSET, SCALE, SEED, WEIGHT, BIAS, CODE, CELL, SUM, Y, STAT, N, PER, salt, eps,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program: R rows of s and y, and (mean, rstd) in STAT [N, 2]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, CP)
    real = (row < N)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    s = tl.load(X + at, mask=real, other=0.0).to(tl.float32)  # [R, CP]
    if BRANCH is not None:
        branch = tl.load(BRANCH + at, mask=real, other=0.0).to(tl.float32)  # [R, CP]
        if OFFSET is not None:
            branch += tl.load(OFFSET + c, mask=c < C, other=0.0)[None, :]  # [CP]
        if DROP > 0:
            branch = tl.where(_kept(SEED, salt, row, c, C, DROP), branch * (1 / (1 - DROP)), 0.0)
        if SCALE is not None:
            branch *= tl.load(SCALE + row // PER, mask=row < N, other=0.0)[:, None]  # [R]
        rounded = (s + branch).to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=real)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 1) / C
    centered = tl.where(real, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    tl.store(STAT + row * 2, mean, mask=row < N)
    tl.store(STAT + row * 2 + 1, rstd, mask=row < N)
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0)  # [CP]
    b = tl.load(BIAS + c, mask=c < C, other=0.0)  # [CP]
    y = centered * rstd[:, None] * w[None, :] + b[None, :]
    if CODE is not None:
        cell = tl.load(CELL + row, mask=row < N, other=0).to(tl.int64)  # [R]
        y += tl.load(CODE + cell[:, None] * C + c[None, :], mask=real, other=0.0).to(tl.float32)  # [R, CP]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N", "PER", "salt"])
def _norm_bwd_kernel(
    DY, DS, SUM, STAT, SCALE, SEED, WEIGHT, BIAS, DX, DBRANCH, Y, PART, N, PER, salt,
    C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, SUM_BRANCH: tl.constexpr,
):  # fmt: skip
    """One program: every P-th tile of rows. With g = w dy

        dx = ds + rstd (g - mean(g) - h mean(g h)),   dbranch = scale_b keep dx / (1 - p)
        dw = sum dy h,   db = sum dy,   doffset = sum dbranch

    Partial sums of dw, db and (with SUM_BRANCH) doffset go to PART [P, 2 or 3, C].
    """
    c = tl.arange(0, CP)
    inside = c < C
    w = tl.load(WEIGHT + c, mask=inside, other=0.0)  # [CP]
    dw = tl.zeros([R, CP], tl.float32)  # summed over rows only at the end, because that crosses lanes
    db = tl.zeros([R, CP], tl.float32)
    doffset = tl.zeros([R, CP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        real = (row < N)[:, None] & inside[None, :]
        at = row[:, None] * C + c[None, :]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)  # [R, CP]
        s = tl.load(SUM + at, mask=real, other=0.0).to(tl.float32)  # [R, CP]
        mean = tl.load(STAT + row * 2, mask=row < N, other=0.0)  # [R]
        rstd = tl.load(STAT + row * 2 + 1, mask=row < N, other=0.0)  # [R]
        h = (s - mean[:, None]) * rstd[:, None]  # beyond C and N every factor it meets is 0
        dw += dy * h
        db += dy
        g = dy * w[None, :]
        mean_g = tl.sum(g, 1) / C
        mean_gh = tl.sum(g * h, 1) / C
        dx = rstd[:, None] * (g - mean_g[:, None] - h * mean_gh[:, None])
        if DS is not None:
            dx += tl.load(DS + at, mask=real, other=0.0).to(tl.float32)  # [R, CP]
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
        if Y is not None:
            b = tl.load(BIAS + c, mask=inside, other=0.0)  # [CP]
            tl.store(Y + at, (h * w[None, :] + b[None, :]).to(Y.dtype.element_ty), mask=real)
        if DROP > 0:
            dx = tl.where(_kept(SEED, salt, row, c, C, DROP), dx * (1 / (1 - DROP)), 0.0)
        if SCALE is not None:
            dx *= tl.load(SCALE + row // PER, mask=row < N, other=0.0)[:, None]  # [R]
        if DBRANCH is not None:
            tl.store(DBRANCH + at, dx.to(DBRANCH.dtype.element_ty), mask=real)
        if SUM_BRANCH:
            doffset += tl.where(real, dx, 0.0)
    part = PART + tl.program_id(0).to(tl.int64) * ((3 if SUM_BRANCH else 2) * C) + c
    tl.store(part, tl.sum(dw, 0), mask=inside)
    tl.store(part + C, tl.sum(db, 0), mask=inside)
    if SUM_BRANCH:
        tl.store(part + 2 * C, tl.sum(doffset, 0), mask=inside)


def launch_config(width: int, *, backward: bool = False) -> dict[str, int]:
    """Rows of a tile (R), padded channels (CP) and warps, the fastest of those tried on an H200.

    In the backward pass, and forward with rows of 512 and more, the sums over a row stay within one warp as far as its
    registers allow: 32 elements a thread. Barriers in every turn of the loop cost more than anything else.
    """
    padded = triton.next_power_of_2(width)
    if backward or padded == 512:
        warps, elements = max(1, padded // 1024), 32
    else:
        warps, elements = max(4, padded // 256), 16
    return {"CP": padded, "R": max(1, 32 * warps * elements // padded), "num_warps": warps}


class Normed(NamedTuple):
    """Results of `forward`."""

    y: Tensor
    """The normalized sum, like x."""
    sum: Tensor
    """s, or x itself where there is no branch."""
    stat: Tensor
    """fp32 mean and rstd of each row, [N, 2]."""


class Gradients(NamedTuple):
    """Results of `backward`."""

    dx: Tensor
    dbranch: Tensor
    """dx itself where neither dropout nor a scale makes a difference."""
    y: Tensor
    """y again, without the code; None unless it was asked for."""
    dweight: Tensor
    dbias: Tensor
    doffset: Tensor
    """fp32 [C], like the two above; the sum of dbranch over all rows; None unless it was asked for."""


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, branch: Tensor | None = None, offset: Tensor | None = None,
    scale: Tensor | None = None, dropout: float = 0.0, seed: Tensor | None = None, salt: int = 0,
    code: Tensor | None = None, cell: Tensor | None = None, eps: float = EPS,
) -> Normed:  # fmt: skip
    """s, y and the statistics; every tensor is contiguous, and weight, bias, offset and scale are fp32.

    Args:
        x, branch: [B, ..., C].
        scale: [B], a factor of the branch per image.
        seed: int32 [salt + 1 or more], needed with dropout; `salt` says which of them.
        code, cell: [T, C] and int32 [N]: row cell[n] of the code is added to row n of y.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    total = x if branch is None else torch.empty_like(x)
    stat = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    config = launch_config(width)
    _norm_fwd_kernel[(triton.cdiv(rows, config["R"]),)](
        X=x, BRANCH=branch, OFFSET=offset, SCALE=scale, SEED=seed, WEIGHT=weight, BIAS=bias, CODE=code, CELL=cell,
        SUM=total, Y=y, STAT=stat, N=rows, PER=rows // x.shape[0], salt=salt, eps=eps, C=width, DROP=dropout, **config,
    )  # fmt: skip
    return Normed(y, total, stat)


def backward(
    dy: Tensor, ds: Tensor | None, total: Tensor, stat: Tensor, weight: Tensor, *, bias: Tensor | None = None,
    scale: Tensor | None = None, dropout: float = 0.0, seed: Tensor | None = None, salt: int = 0,
    sum_branch: bool = False, run: Run = at_once,
) -> Gradients:  # fmt: skip
    """Gradients from those of y and s; every tensor is contiguous.

    Args:
        dy: gradient of y.
        ds: gradient that reaches s from elsewhere; None: none.
        total, stat, weight, scale, dropout, seed, salt: as in or from `forward`.
        bias: if given, y is written again.
        sum_branch: whether the sum of dbranch over all rows (the gradient of the offset) is wanted.
        run: calls what only the gradients of the parameters need, see `side_stream`.
    """
    width = total.shape[-1]
    rows = total.numel() // width
    dx = torch.empty_like(total)
    apart = bool(dropout) or scale is not None
    dbranch = torch.empty_like(total) if apart else None
    y = None if bias is None else torch.empty_like(total)
    config = launch_config(width, backward=True)
    programs = min(triton.cdiv(rows, config["R"]), PROGRAMS_PER_SM * multiprocessors(total.device))
    part = torch.empty(programs, (3 if sum_branch else 2) * width, dtype=torch.float32, device=total.device)
    _norm_bwd_kernel[(programs,)](
        DY=dy, DS=ds, SUM=total, STAT=stat, SCALE=scale, SEED=seed, WEIGHT=weight, BIAS=bias, DX=dx, DBRANCH=dbranch,
        Y=y, PART=part, N=rows, PER=rows // total.shape[0], salt=salt, C=width, DROP=dropout, SUM_BRANCH=sum_branch,
        **config,
    )  # fmt: skip
    sums = run(column_sums, part).view(-1, width)
    doffset = sums[2] if sum_branch else None
    return Gradients(dx, dx if dbranch is None else dbranch, cast(Tensor, y), sums[0], sums[1], cast(Tensor, doffset))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None,
        scale: Tensor | None, dropout: float, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x.device) if dropout else None
        y, total, stat = forward(
            x, weight, bias, branch=branch, offset=offset, scale=scale, dropout=dropout, seed=seed, eps=eps
        )
        ctx.save_for_backward(total, stat, weight, scale, seed)
        ctx.dropout, ctx.has_offset = dropout, offset is not None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        total, stat, weight, scale, seed = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        found = backward(
            dy, None if ds is None else ds.contiguous(), total, stat, weight,
            scale=scale, dropout=ctx.dropout, seed=seed, sum_branch=ctx.has_offset,
        )  # fmt: skip
        return found.dx, found.dbranch, found.dweight, found.dbias, found.doffset, None, None, None


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
    offset_C = None if offset_C is None else offset_C.float().contiguous()
    scale_B = None if scale_B is None else scale_B.float().contiguous()
    weight_C, bias_C = weight_C.float().contiguous(), bias_C.float().contiguous()
    return _ResidualNorm.apply(
        x_BNC.contiguous(), branch_BNC.contiguous(), weight_C, bias_C, offset_C, scale_B, dropout, eps
    )
