"""Token merging on tensor cores: forward, its gradients, and both as operators of PyTorch.

    z[k, c, :] = sum_i g_c(k, i) s_i F[i, :],   g = GELU(LayerNorm(linear(dx, dy, d, dy/d, dx/d))),   c = 1..4

16 survivors walk the union of their clusters (see neighbourhoods/walks.py) in tiles of 32 tokens. The four weights of a
pair are computed on the fly, in registers, and multiplied by score and membership, so that the sum over tokens is four
dense products. For the gradients of features and scores 16 tokens walk the transposed list: every program owns what it
writes, nothing is atomic, and the result has the same bits in every run.

    U[i, :] = sum_k,c g_c(k, i) dz[k, c, :],   dF_i = s_i U_i,   ds_i = F_i . U_i,   dg_c(k, i) = s_i F_i . dz[k, c, :]

Axes: B batch, N tokens, K survivors, G groups of R = 16 rows, J = 32 columns of a tile, C channels, CB of a block.
PARAMETERS is [4, 8]: per weight c the five factors of the geometry, the bias, and the LayerNorm's weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums
from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.walks import GROUP, build_walks

_SIZES = ["N", "K", "ENTRIES", "GROUPS"]
"""Not C: that it is a multiple of 16 makes loads wide."""
EPS = tl.constexpr(1e-5)


WEIGHT_PROGRAMS = 528
"""Most of the weights' gradient: two waves of the two that a multiprocessor holds, on a card of 132."""


def launch_options(dtype: torch.dtype, *, weight_gradient: bool = False) -> dict[str, int]:
    """Clusters of a tile, channels of a block, warps. fp32 products run on the ordinary units and need registers.
    The weights' gradient walks all channels itself: in longer strides a fifth faster on an H100."""
    if dtype == torch.float32:
        return {"TILE": 2, "CB": 32, "num_warps": 4, "num_stages": 1}
    return {"TILE": 4, "CB": 128 if weight_gradient else 64, "num_warps": 4, "num_stages": 1}


@triton.jit
def _read_columns(ENTRY, e0, count, SIZE, TILE: tl.constexpr):
    """Rows (clamped) and membership bits of the members of TILE listed clusters."""
    j = tl.arange(0, TILE * 8)
    entry = tl.load(ENTRY + e0 + j // 8, mask=e0 + j // 8 < count, other=0)
    row = (entry >> 16) * 8 + j % 8
    return tl.minimum(row, SIZE - 1), tl.where(row < SIZE, entry & 0xFFFF, 0)


@triton.jit
def _geometry(dx, dy):
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
def _normalised(PARAMETERS, dx, dy):
    """The linear layer's four outputs after LayerNorm without its affine part, and 1 / standard deviation."""
    d, ry, rx = _geometry(dx, dy)
    a0 = _raw(PARAMETERS, 0, dx, dy, d, ry, rx)
    a1 = _raw(PARAMETERS, 1, dx, dy, d, ry, rx)
    a2 = _raw(PARAMETERS, 2, dx, dy, d, ry, rx)
    a3 = _raw(PARAMETERS, 3, dx, dy, d, ry, rx)
    mean = (a0 + a1 + a2 + a3) * 0.25
    a0, a1, a2, a3 = a0 - mean, a1 - mean, a2 - mean, a3 - mean
    rstd = 1 / tl.sqrt((a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3) * 0.25 + EPS)
    return a0 * rstd, a1 * rstd, a2 * rstd, a3 * rstd, rstd


@triton.jit
def _weight(PARAMETERS, c: tl.constexpr, h):
    """GELU of the LayerNorm's output c."""
    u = h * tl.load(PARAMETERS + c * 8 + 6) + tl.load(PARAMETERS + c * 8 + 7)
    return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _weight_gradient(PARAMETERS, c: tl.constexpr, h, dg):
    """Gradient before GELU (its sums are those of the LayerNorm's weight and bias), and of h."""
    scale = tl.load(PARAMETERS + c * 8 + 6)
    u = h * scale + tl.load(PARAMETERS + c * 8 + 7)
    slope = 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    du = dg * slope
    return du, du * scale


@triton.jit(do_not_specialize=_SIZES)
def _merging_forward_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, PARAMETERS, OUT, N, K, ENTRIES, GROUPS, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: z of one group of survivors, one block of channels."""
    g = tl.program_id(0) % GROUPS
    b = (tl.program_id(0) // GROUPS).to(tl.int64)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    row = g * R + tl.arange(0, R)
    survivor = tl.load(SURVIVORS + b * K + tl.minimum(row, K - 1))
    pos = POS + b * N * 2
    x_R = tl.load(pos + survivor * 2).to(tl.float32)
    y_R = tl.load(pos + survivor * 2 + 1).to(tl.float32)
    bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
    z0 = tl.zeros([R, CB], tl.float32)
    z1 = tl.zeros([R, CB], tl.float32)
    z2 = tl.zeros([R, CB], tl.float32)
    z3 = tl.zeros([R, CB], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in range(0, count, TILE):
        col, bits = _read_columns(entry, e0, count, N, TILE)
        at = (b * N + col)[:, None] * C + channel[None, :]
        feat = tl.load(FEAT + at, mask=(channel < C)[None, :], other=0.0)  # [J, CB]
        dx = tl.load(pos + col * 2).to(tl.float32)[None, :] - x_R[:, None]
        dy = tl.load(pos + col * 2 + 1).to(tl.float32)[None, :] - y_R[:, None]
        score = tl.load(SCORE + b * N + col)
        share = tl.where((bits[None, :] & bit[:, None]) != 0, score[None, :], 0.0)  # [R, J]
        h0, h1, h2, h3, _ = _normalised(PARAMETERS, dx, dy)
        z0 = tl.dot((_weight(PARAMETERS, 0, h0) * share).to(feat.dtype), feat, z0, input_precision=PREC)
        z1 = tl.dot((_weight(PARAMETERS, 1, h1) * share).to(feat.dtype), feat, z1, input_precision=PREC)
        z2 = tl.dot((_weight(PARAMETERS, 2, h2) * share).to(feat.dtype), feat, z2, input_precision=PREC)
        z3 = tl.dot((_weight(PARAMETERS, 3, h3) * share).to(feat.dtype), feat, z3, input_precision=PREC)
    out = OUT + (b * K + row)[:, None] * 4 * C + channel[None, :]
    real = (row < K)[:, None] & (channel < C)[None, :]
    tl.store(out, z0.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + C, z1.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 2 * C, z2.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 3 * C, z3.to(OUT.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=_SIZES)
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
        col, bits = _read_columns(entry, e0, count, K, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        survivor = tl.load(SURVIVORS + b * K + col)
        dx = x_R[:, None] - tl.load(pos + survivor * 2).to(tl.float32)[None, :]
        dy = y_R[:, None] - tl.load(pos + survivor * 2 + 1).to(tl.float32)[None, :]
        member = tl.where((bits[None, :] & bit[:, None]) != 0, 1.0, 0.0)
        h0, h1, h2, h3, _ = _normalised(PARAMETERS, dx, dy)
        at = DZ + (b * K + col)[:, None] * 4 * C + channel[None, :]
        real = (channel < C)[None, :]
        dz = tl.load(at, mask=real, other=0.0)
        u = tl.dot((_weight(PARAMETERS, 0, h0) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + C, mask=real, other=0.0)
        u = tl.dot((_weight(PARAMETERS, 1, h1) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 2 * C, mask=real, other=0.0)
        u = tl.dot((_weight(PARAMETERS, 2, h2) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 3 * C, mask=real, other=0.0)
        u = tl.dot((_weight(PARAMETERS, 3, h3) * member).to(dz.dtype), dz, u, input_precision=PREC)
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


@triton.jit(do_not_specialize=[*_SIZES, "LAST"])
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
            col, bits = _read_columns(entry, e0, count, N, TILE)
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
            h0, h1, h2, h3, rstd = _normalised(PARAMETERS, dx, dy)
            du0, dh0 = _weight_gradient(PARAMETERS, 0, h0, dg0 * share)
            du1, dh1 = _weight_gradient(PARAMETERS, 1, h1, dg1 * share)
            du2, dh2 = _weight_gradient(PARAMETERS, 2, h2, dg2 * share)
            du3, dh3 = _weight_gradient(PARAMETERS, 3, h3, dg3 * share)
            mean = (dh0 + dh1 + dh2 + dh3) * 0.25
            along = (dh0 * h0 + dh1 * h1 + dh2 * h2 + dh3 * h3) * 0.25
            d, ry, rx = _geometry(dx, dy)
            s00, s01, s02, s03, s04, s05, s06, s07 = _add(
                s00,
                s01,
                s02,
                s03,
                s04,
                s05,
                s06,
                s07,
                du0,
                h0,
                rstd * (dh0 - mean - h0 * along),
                dx,
                dy,
                d,
                ry,
                rx,
                R,
                J,
            )
            s10, s11, s12, s13, s14, s15, s16, s17 = _add(
                s10,
                s11,
                s12,
                s13,
                s14,
                s15,
                s16,
                s17,
                du1,
                h1,
                rstd * (dh1 - mean - h1 * along),
                dx,
                dy,
                d,
                ry,
                rx,
                R,
                J,
            )
            s20, s21, s22, s23, s24, s25, s26, s27 = _add(
                s20,
                s21,
                s22,
                s23,
                s24,
                s25,
                s26,
                s27,
                du2,
                h2,
                rstd * (dh2 - mean - h2 * along),
                dx,
                dy,
                d,
                ry,
                rx,
                R,
                J,
            )
            s30, s31, s32, s33, s34, s35, s36, s37 = _add(
                s30,
                s31,
                s32,
                s33,
                s34,
                s35,
                s36,
                s37,
                du3,
                h3,
                rstd * (dh3 - mean - h3 * along),
                dx,
                dy,
                d,
                ry,
                rx,
                R,
                J,
            )
    part = PART + tl.program_id(0).to(tl.int64) * 32
    _store_sums(part + 0, s00, s01, s02, s03, s04, s05, s06, s07)
    _store_sums(part + 8, s10, s11, s12, s13, s14, s15, s16, s17)
    _store_sums(part + 16, s20, s21, s22, s23, s24, s25, s26, s27)
    _store_sums(part + 24, s30, s31, s32, s33, s34, s35, s36, s37)


def _constants(feat: Tensor, *, weight_gradient: bool = False) -> dict[str, Any]:
    options = launch_options(feat.dtype, weight_gradient=weight_gradient)
    return {"R": GROUP, "PREC": precision_of(feat.dtype)} | options


@torch.library.custom_op("affmae::merge_tokens", mutates_args=())
def _forward(
    feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> Tensor:  # fmt: skip
    batch, tokens, channels = feat.shape
    count, groups = survivors.shape[1], row_count.shape[1]
    out = torch.empty(batch, count, 4 * channels, dtype=feat.dtype, device=feat.device)
    constants = _constants(feat)
    grid = (batch * groups, triton.cdiv(channels, constants["CB"]))
    _merging_forward_kernel[grid](
        feat, score, pos, survivors, row_entry, row_count, parameters, out,
        tokens, count, row_entry.shape[2], groups, channels, **constants,
    )  # fmt: skip
    return out


@_forward.register_fake
def _(
    feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> Tensor:  # fmt: skip
    return feat.new_empty(feat.shape[0], survivors.shape[1], 4 * feat.shape[2])


@torch.library.custom_op("affmae::merge_tokens_backward", mutates_args=())
def _backward(
    dz: Tensor, feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, channels = feat.shape
    count, dz = survivors.shape[1], dz.contiguous()
    constants = _constants(feat)
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
    _merging_weight_kernel[(programs,)](
        feat, score, pos, survivors, row_entry, row_count, parameters, dz, part,
        tokens, count, row_entry.shape[2], groups, batch * groups, channels, **_constants(feat, weight_gradient=True),
    )  # fmt: skip
    return dfeat, dscore.sum(0), column_sums(part).view(4, 8)


@_backward.register_fake
def _(
    dz: Tensor, feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(feat), torch.empty_like(score), torch.empty_like(parameters)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dz, *ctx.saved_tensors), None, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def merge_tokens(
    feat_BNC: Tensor,
    score_BN: Tensor,
    survivors_BK: Tensor,
    neighbourhoods: Neighbourhoods,
    weight_45: Tensor,
    bias_4: Tensor,
    norm_weight_4: Tensor,
    norm_bias_4: Tensor,
) -> Tensor:
    """See the package for the formula and the shapes."""
    nearest_BNC = neighbourhoods.nearest_BNC
    chosen_BKC = torch.gather(nearest_BNC, 1, survivors_BK[..., None].expand(-1, -1, nearest_BNC.shape[2]))
    walks = build_walks(chosen_BKC, neighbourhoods.count)
    columns = [bias_4, norm_weight_4, norm_bias_4]
    parameters_48 = torch.cat([weight_45.float(), *(column.float()[:, None] for column in columns)], 1)
    return _forward(
        feat_BNC.contiguous(),
        score_BN.float().contiguous(),
        parameters_48,
        neighbourhoods.pos_BN2.contiguous(),
        survivors_BK.contiguous(),
        walks.rows.entry_BGE,
        walks.rows.count_BG,
        walks.keys.entry_BGE,
        walks.keys.count_BG,
    )
