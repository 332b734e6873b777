"""Gradients of token merging on tensor cores; formulas and axes are those of `triton_impl`.

Two kernels: one owns groups of tokens and walks the transposed list, the other sums the weight network's gradients over
all pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums
from affmae_kernels.token_merging.triton_pairs import (
    SIZES,
    constants_of,
    geometry,
    normalised,
    read_columns,
    weight_gradient_of,
    weight_of,
)

WEIGHT_PROGRAMS = 528
"""Most of the weights' gradient: two waves of the two that a multiprocessor holds, on a card of 132."""


@triton.jit(do_not_specialize=SIZES)
def _merging_token_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, PARAMETERS, DZ, DFEAT, DSCORE, N, K, ENTRIES, GROUPS, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: dF of one group of tokens, one block of channels, and this block's part of ds. The columns are the
    survivors that have one of the group's clusters as a neighbour."""
    g = tl.program_id(0) % GROUPS
    b = (tl.program_id(0) // GROUPS).to(tl.int64)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    i = tl.arange(0, R)
    row = g * R + i
    row_c = tl.minimum(row, N - 1)
    pos = POS + b * N * 2
    x_R = tl.load(pos + row_c * 2).to(tl.float32)
    y_R = tl.load(pos + row_c * 2 + 1).to(tl.float32)
    bit = tl.full([R], 1, tl.int32) << (8 * (i // 8))  # the byte of the token's cluster; a survivor's bit comes down
    u = tl.zeros([R, CB], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in range(0, count, TILE):
        col, bits = read_columns(entry, e0, count, K, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        survivor = tl.load(SURVIVORS + b * K + col)
        dx = x_R[:, None] - tl.load(pos + survivor * 2).to(tl.float32)[None, :]
        dy = y_R[:, None] - tl.load(pos + survivor * 2 + 1).to(tl.float32)[None, :]
        member = tl.where((bits[None, :] & bit[:, None]) != 0, 1.0, 0.0)
        h0, h1, h2, h3, _ = normalised(PARAMETERS, dx, dy)
        at = DZ + (b * K + col)[:, None] * 4 * C + channel[None, :]
        real = (channel < C)[None, :]
        dz = tl.load(at, mask=real, other=0.0)
        u = tl.dot((weight_of(PARAMETERS, 0, h0) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + C, mask=real, other=0.0)
        u = tl.dot((weight_of(PARAMETERS, 1, h1) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 2 * C, mask=real, other=0.0)
        u = tl.dot((weight_of(PARAMETERS, 2, h2) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 3 * C, mask=real, other=0.0)
        u = tl.dot((weight_of(PARAMETERS, 3, h3) * member).to(dz.dtype), dz, u, input_precision=PREC)
    at = (b * N + row)[:, None] * C + channel[None, :]
    real = (row < N)[:, None] & (channel < C)[None, :]
    score = tl.load(SCORE + b * N + row_c)
    tl.store(DFEAT + at, (u * score[:, None]).to(DFEAT.dtype.element_ty), mask=real)
    feat = tl.load(FEAT + at, mask=real, other=0.0).to(tl.float32)
    dscore = DSCORE + (tl.program_id(1) * (tl.num_programs(0) // GROUPS) + b) * N + row
    tl.store(dscore, tl.sum(feat * u, 1), mask=row < N)


@triton.jit
def _pairs(x, R: tl.constexpr, J: tl.constexpr):
    """[R, J / 2] sums of neighbouring columns. They lie in one thread, so nothing is exchanged and half the registers
    are left for other programs."""
    return tl.sum(tl.reshape(x, (R, J // 2, 2)), 2)


@triton.jit
def _add(
    t0, t1, t2, t3, t4, t5, t6, t7, du, h, da, dx, dy, d, ry, rx, R: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """Adds one weight's eight products of a tile of pairs to their running totals."""
    t0 += _pairs(da * dx, R, J)
    t1 += _pairs(da * dy, R, J)
    t2 += _pairs(da * d, R, J)
    t3 += _pairs(da * ry, R, J)
    t4 += _pairs(da * rx, R, J)
    return t0, t1, t2, t3, t4, t5 + _pairs(da, R, J), t6 + _pairs(du * h, R, J), t7 + _pairs(du, R, J)


@triton.jit
def _store_sums(part, t0, t1, t2, t3, t4, t5, t6, t7):
    """Sums of one weight's eight totals."""
    tl.store(part, tl.sum(tl.sum(t0, 1), 0))
    tl.store(part + 1, tl.sum(tl.sum(t1, 1), 0))
    tl.store(part + 2, tl.sum(tl.sum(t2, 1), 0))
    tl.store(part + 3, tl.sum(tl.sum(t3, 1), 0))
    tl.store(part + 4, tl.sum(tl.sum(t4, 1), 0))
    tl.store(part + 5, tl.sum(tl.sum(t5, 1), 0))
    tl.store(part + 6, tl.sum(tl.sum(t6, 1), 0))
    tl.store(part + 7, tl.sum(tl.sum(t7, 1), 0))


@triton.jit(do_not_specialize=[*SIZES, "LAST"])
def _merging_weight_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, PARAMETERS, DZ, PART, N, K, ENTRIES, GROUPS, LAST, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: the parameters' gradients from every P-th of the LAST groups of survivors, in its line of PART
    [P, 4, 8]. Sums across lanes and warps, which cost as much as three tiles, come once at the end."""
    J: tl.constexpr = TILE * 8
    zero = tl.zeros([R, J // 2], tl.float32)
    s00, s01, s02, s03, s04, s05, s06, s07 = zero, zero, zero, zero, zero, zero, zero, zero
    s10, s11, s12, s13, s14, s15, s16, s17 = zero, zero, zero, zero, zero, zero, zero, zero
    s20, s21, s22, s23, s24, s25, s26, s27 = zero, zero, zero, zero, zero, zero, zero, zero
    s30, s31, s32, s33, s34, s35, s36, s37 = zero, zero, zero, zero, zero, zero, zero, zero
    for group in range(tl.program_id(0), LAST, tl.num_programs(0)):
        g = group % GROUPS
        b = (group // GROUPS).to(tl.int64)
        row = g * R + tl.arange(0, R)
        live = row < K
        row_c = tl.minimum(row, K - 1)
        survivor = tl.load(SURVIVORS + b * K + row_c)
        pos = POS + b * N * 2
        x_R = tl.load(pos + survivor * 2).to(tl.float32)
        y_R = tl.load(pos + survivor * 2 + 1).to(tl.float32)
        bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
        count = tl.load(COUNT + b * GROUPS + g)
        entry = ENTRY + (b * GROUPS + g) * ENTRIES
        for e0 in range(0, count, TILE):
            col, bits = read_columns(entry, e0, count, N, TILE)
            dg0 = tl.zeros([R, J], tl.float32)
            dg1 = tl.zeros([R, J], tl.float32)
            dg2 = tl.zeros([R, J], tl.float32)
            dg3 = tl.zeros([R, J], tl.float32)
            for c0 in range(0, C, CB):
                channel = c0 + tl.arange(0, CB)
                real = (channel < C)[None, :]
                feat = tl.load(FEAT + (b * N + col)[:, None] * C + channel[None, :], mask=real, other=0.0)
                feat = tl.permute(feat, (1, 0))  # [CB, J]
                at = DZ + (b * K + row_c)[:, None] * 4 * C + channel[None, :]
                dg0 = tl.dot(tl.load(at, mask=real, other=0.0), feat, dg0, input_precision=PREC)
                dg1 = tl.dot(tl.load(at + C, mask=real, other=0.0), feat, dg1, input_precision=PREC)
                dg2 = tl.dot(tl.load(at + 2 * C, mask=real, other=0.0), feat, dg2, input_precision=PREC)
                dg3 = tl.dot(tl.load(at + 3 * C, mask=real, other=0.0), feat, dg3, input_precision=PREC)
            dx = tl.load(pos + col * 2).to(tl.float32)[None, :] - x_R[:, None]
            dy = tl.load(pos + col * 2 + 1).to(tl.float32)[None, :] - y_R[:, None]
            member = ((bits[None, :] & bit[:, None]) != 0) & live[:, None]
            share = tl.where(member, tl.load(SCORE + b * N + col)[None, :], 0.0)
            h0, h1, h2, h3, rstd = normalised(PARAMETERS, dx, dy)
            du0, dh0 = weight_gradient_of(PARAMETERS, 0, h0, dg0 * share)
            du1, dh1 = weight_gradient_of(PARAMETERS, 1, h1, dg1 * share)
            du2, dh2 = weight_gradient_of(PARAMETERS, 2, h2, dg2 * share)
            du3, dh3 = weight_gradient_of(PARAMETERS, 3, h3, dg3 * share)
            mean = (dh0 + dh1 + dh2 + dh3) * 0.25
            along = (dh0 * h0 + dh1 * h1 + dh2 * h2 + dh3 * h3) * 0.25
            d, ry, rx = geometry(dx, dy)
            s00, s01, s02, s03, s04, s05, s06, s07 = _add(
                s00, s01, s02, s03, s04, s05, s06, s07,
                du0, h0, rstd * (dh0 - mean - h0 * along), dx, dy, d, ry, rx, R, J,
            )  # fmt: skip
            s10, s11, s12, s13, s14, s15, s16, s17 = _add(
                s10, s11, s12, s13, s14, s15, s16, s17,
                du1, h1, rstd * (dh1 - mean - h1 * along), dx, dy, d, ry, rx, R, J,
            )  # fmt: skip
            s20, s21, s22, s23, s24, s25, s26, s27 = _add(
                s20, s21, s22, s23, s24, s25, s26, s27,
                du2, h2, rstd * (dh2 - mean - h2 * along), dx, dy, d, ry, rx, R, J,
            )  # fmt: skip
            s30, s31, s32, s33, s34, s35, s36, s37 = _add(
                s30, s31, s32, s33, s34, s35, s36, s37,
                du3, h3, rstd * (dh3 - mean - h3 * along), dx, dy, d, ry, rx, R, J,
            )  # fmt: skip
    part = PART + tl.program_id(0).to(tl.int64) * 32
    _store_sums(part + 0, s00, s01, s02, s03, s04, s05, s06, s07)
    _store_sums(part + 8, s10, s11, s12, s13, s14, s15, s16, s17)
    _store_sums(part + 16, s20, s21, s22, s23, s24, s25, s26, s27)
    _store_sums(part + 24, s30, s31, s32, s33, s34, s35, s36, s37)


@torch.library.custom_op("affmae::merge_tokens_backward", mutates_args=())
def merge_tokens_backward(
    dz: Tensor, feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, channels = feat.shape
    count, dz = survivors.shape[1], dz.contiguous()
    constants = constants_of(feat.dtype)
    blocks = triton.cdiv(channels, constants["CB"])
    dfeat = torch.empty_like(feat)
    dscore = torch.empty(blocks, batch, tokens, dtype=torch.float32, device=feat.device)
    groups = key_count.shape[1]
    _merging_token_kernel[(batch * groups, blocks)](
        feat, score, pos, survivors, key_entry, key_count, parameters, dz, dfeat, dscore,
        tokens, count, key_entry.shape[2], groups, channels, **constants,
    )  # fmt: skip
    groups = row_count.shape[1]
    programs = min(batch * groups, WEIGHT_PROGRAMS)
    part = torch.empty(programs, 32, dtype=torch.float32, device=feat.device)
    constants = constants_of(feat.dtype, weight_gradient=True)
    _merging_weight_kernel[(programs,)](
        feat, score, pos, survivors, row_entry, row_count, parameters, dz, part,
        tokens, count, row_entry.shape[2], groups, batch * groups, channels, **constants,
    )  # fmt: skip
    return dfeat, dscore.sum(0), column_sums(part).view(4, 8)


@merge_tokens_backward.register_fake
def _(
    dz: Tensor, feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(feat), torch.empty_like(score), torch.empty_like(parameters)
