"""Token merging on tensor cores.

    z[k, c, :] = sum_i g_c(k, i) s_i F[i, :],   g = GELU(LayerNorm(linear(dx, dy, d, dy/d, dx/d))),   c = 1..4

16 survivors visit the union of their clusters (see neighbourhoods/visit_lists.py) in tiles of 32 tokens. The four
weights of a pair are computed on the fly, in registers, and multiplied by score and membership, so that the sum over
tokens is four dense products. For the gradients of features and scores 16 tokens visit the transposed list: every
program owns what it writes, nothing is atomic, and the result has the same bits in every run.

    U[i, :] = sum_k,c g_c(k, i) dz[k, c, :],   dF_i = s_i U_i,   ds_i = F_i . U_i,   dg_c(k, i) = s_i F_i . dz[k, c, :]

Axes: B batch, N tokens, K survivors, R = 16 rows of a group, J columns of a tile, C channels, CB of a block.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.gaussian import normal
from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.pairs import image_and_part, pair_geometry, positions, read_columns
from affmae_kernels.neighbourhoods.visit_lists import GROUP, VisitLists, build_visit_lists

EPS = tl.constexpr(1e-5)
SIZES = ["N", "K", "ENTRIES", "GROUPS"]
"""Not C: that it is a multiple of 16 makes loads wide."""
WEIGHT_PROGRAMS = 528
"""Most programs of the weights' gradient: two waves of the two that a multiprocessor holds, on a card of 132."""
Pass = Literal["fwd", "bwd_dfeat", "bwd_dweight"]


# --- The weights of a pair. W [4, 5] and W_BIAS [4] are the linear layer, LN and LN_BIAS [4] the LayerNorm's affine part.


@triton.jit
def _linear(W, W_BIAS, c: tl.constexpr, dx, dy, d, ry, rx):
    """The linear layer's output c for every pair."""
    p = W + c * 5
    near = tl.load(p) * dx + tl.load(p + 1) * dy + tl.load(p + 2) * d
    return near + tl.load(p + 3) * ry + tl.load(p + 4) * rx + tl.load(W_BIAS + c)


@triton.jit
def _normalized(W, W_BIAS, dx, dy, d, ry, rx):
    """The linear layer's four outputs after LayerNorm without its affine part, and 1 / standard deviation."""
    a0 = _linear(W, W_BIAS, 0, dx, dy, d, ry, rx)
    a1 = _linear(W, W_BIAS, 1, dx, dy, d, ry, rx)
    a2 = _linear(W, W_BIAS, 2, dx, dy, d, ry, rx)
    a3 = _linear(W, W_BIAS, 3, dx, dy, d, ry, rx)
    mean = (a0 + a1 + a2 + a3) * 0.25
    a0, a1, a2, a3 = a0 - mean, a1 - mean, a2 - mean, a3 - mean
    rstd = tl.rsqrt((a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3) * 0.25 + EPS)
    return a0 * rstd, a1 * rstd, a2 * rstd, a3 * rstd, rstd


@triton.jit
def _weight(LN, LN_BIAS, c: tl.constexpr, h):
    """g_c: GELU of the LayerNorm's output c."""
    u = h * tl.load(LN + c) + tl.load(LN_BIAS + c)
    below, _ = normal(u)
    return u * below


@triton.jit
def _weight_gradient(LN, LN_BIAS, c: tl.constexpr, h, dg):
    """Gradient before GELU (its sums are those of the LayerNorm's weight and bias), and of h."""
    scale = tl.load(LN + c)
    u = h * scale + tl.load(LN_BIAS + c)
    below, density = normal(u)
    du = dg * (below + u * density)
    return du, du * scale


# --- Kernels


@triton.jit(do_not_specialize=SIZES)
def _merging_fwd_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, W, W_BIAS, LN, LN_BIAS, OUT, N, K, ENTRIES, GROUPS, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: z of one group of survivors, one block of channels."""
    b, g = image_and_part(GROUPS)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    row = g * R + tl.arange(0, R)
    bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
    pos = POS + b * N * 2
    # [R]
    survivor = tl.load(SURVIVORS + b * K + tl.minimum(row, K - 1))
    x_R, y_R = positions(pos, survivor)
    z0 = tl.zeros([R, CB], tl.float32)
    z1 = tl.zeros([R, CB], tl.float32)
    z2 = tl.zeros([R, CB], tl.float32)
    z3 = tl.zeros([R, CB], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in range(0, count, TILE):
        col, bits = read_columns(entry, e0, count, N, TILE)
        # [J, CB]
        feat = tl.load(FEAT + (b * N + col)[:, None] * C + channel[None, :], mask=(channel < C)[None, :], other=0.0)
        # [J]
        score = tl.load(SCORE + b * N + col)
        x_J, y_J = positions(pos, col)
        dx, dy = x_J[None, :] - x_R[:, None], y_J[None, :] - y_R[:, None]
        share = tl.where((bits[None, :] & bit[:, None]) != 0, score[None, :], 0.0)  # [R, J]
        d, ry, rx = pair_geometry(dx, dy)
        h0, h1, h2, h3, _ = _normalized(W, W_BIAS, dx, dy, d, ry, rx)
        z0 = tl.dot((_weight(LN, LN_BIAS, 0, h0) * share).to(feat.dtype), feat, z0, input_precision=PREC)
        z1 = tl.dot((_weight(LN, LN_BIAS, 1, h1) * share).to(feat.dtype), feat, z1, input_precision=PREC)
        z2 = tl.dot((_weight(LN, LN_BIAS, 2, h2) * share).to(feat.dtype), feat, z2, input_precision=PREC)
        z3 = tl.dot((_weight(LN, LN_BIAS, 3, h3) * share).to(feat.dtype), feat, z3, input_precision=PREC)
    out = OUT + (b * K + row)[:, None] * 4 * C + channel[None, :]
    real = (row < K)[:, None] & (channel < C)[None, :]
    tl.store(out, z0.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + C, z1.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 2 * C, z2.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 3 * C, z3.to(OUT.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=SIZES)
def _merging_bwd_dfeat_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, W, W_BIAS, LN, LN_BIAS, DZ, DFEAT, DSCORE, N, K, ENTRIES, GROUPS, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: dF of one group of tokens, one block of channels, and this block's part of ds. The columns are the
    survivors that have one of the group's clusters as a neighbour."""
    b, g = image_and_part(GROUPS)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    row = g * R + tl.arange(0, R)
    clamped = tl.minimum(row, N - 1)
    # The byte of the token's cluster; the survivor's bit in it is shifted down
    bit = tl.full([R], 1, tl.int32) << (8 * (tl.arange(0, R) // 8))
    pos = POS + b * N * 2
    x_R, y_R = positions(pos, clamped)
    u = tl.zeros([R, CB], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in range(0, count, TILE):
        col, bits = read_columns(entry, e0, count, K, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        # [J]
        survivor = tl.load(SURVIVORS + b * K + col)
        x_J, y_J = positions(pos, survivor)
        dx, dy = x_R[:, None] - x_J[None, :], y_R[:, None] - y_J[None, :]
        member = tl.where((bits[None, :] & bit[:, None]) != 0, 1.0, 0.0)
        d, ry, rx = pair_geometry(dx, dy)
        h0, h1, h2, h3, _ = _normalized(W, W_BIAS, dx, dy, d, ry, rx)
        at = DZ + (b * K + col)[:, None] * 4 * C + channel[None, :]
        real = (channel < C)[None, :]
        # [J, CB]
        dz = tl.load(at, mask=real, other=0.0)
        u = tl.dot((_weight(LN, LN_BIAS, 0, h0) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + C, mask=real, other=0.0)
        u = tl.dot((_weight(LN, LN_BIAS, 1, h1) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 2 * C, mask=real, other=0.0)
        u = tl.dot((_weight(LN, LN_BIAS, 2, h2) * member).to(dz.dtype), dz, u, input_precision=PREC)
        dz = tl.load(at + 3 * C, mask=real, other=0.0)
        u = tl.dot((_weight(LN, LN_BIAS, 3, h3) * member).to(dz.dtype), dz, u, input_precision=PREC)
    at = (b * N + row)[:, None] * C + channel[None, :]
    real = (row < N)[:, None] & (channel < C)[None, :]
    # [R]
    score = tl.load(SCORE + b * N + clamped)
    tl.store(DFEAT + at, (u * score[:, None]).to(DFEAT.dtype.element_ty), mask=real)
    # [R, CB]
    feat = tl.load(FEAT + at, mask=real, other=0.0).to(tl.float32)
    dscore = DSCORE + (tl.program_id(1) * (tl.num_programs(0) // GROUPS) + b) * N + row
    tl.store(dscore, tl.sum(feat * u, 1), mask=row < N)


@triton.jit
def _add(total, du, h, da, dx, dy, d, ry, rx, R: tl.constexpr, J: tl.constexpr):
    """Adds one weight's products of a tile of pairs to its eight running totals: of the linear layer's five factors and
    bias, and of the LayerNorm's weight and bias."""
    t0, t1, t2, t3, t4, t5, t6, t7 = total
    return (
        t0 + _lane_sums(da * dx, R, J),
        t1 + _lane_sums(da * dy, R, J),
        t2 + _lane_sums(da * d, R, J),
        t3 + _lane_sums(da * ry, R, J),
        t4 + _lane_sums(da * rx, R, J),
        t5 + _lane_sums(da, R, J),
        t6 + _lane_sums(du * h, R, J),
        t7 + _lane_sums(du, R, J),
    )


@triton.jit
def _lane_sums(x, R: tl.constexpr, J: tl.constexpr):
    """[R, J / 2] sums of neighbouring columns. They lie in one lane, so that nothing is exchanged in the loop, and half
    the registers are left for other programs."""
    return tl.sum(tl.reshape(x, (R, J // 2, 2)), 2)


@triton.jit
def _store_sums(part, c: tl.constexpr, total):
    """Sums of one weight's eight totals, into a line of 20 + 3 * 4 numbers."""
    for f in tl.static_range(5):
        tl.store(part + c * 5 + f, tl.sum(tl.sum(total[f], 1), 0))
    for f in tl.static_range(5, 8):
        tl.store(part + 4 * f + c, tl.sum(tl.sum(total[f], 1), 0))


@triton.jit(do_not_specialize=[*SIZES, "LAST"])
def _merging_bwd_dweight_kernel(
    FEAT, SCORE, POS, SURVIVORS, ENTRY, COUNT, W, W_BIAS, LN, LN_BIAS, DZ, PART, N, K, ENTRIES, GROUPS, LAST, C,
    R: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: the parameters' gradients from every P-th of the LAST groups of survivors, in its line of PART
    [P, 32]. Sums across lanes and warps, which cost as much as three tiles, come once at the end."""
    J: tl.constexpr = TILE * 8
    zero = tl.zeros([R, J // 2], tl.float32)
    total0 = (zero, zero, zero, zero, zero, zero, zero, zero)
    total1 = (zero, zero, zero, zero, zero, zero, zero, zero)
    total2 = (zero, zero, zero, zero, zero, zero, zero, zero)
    total3 = (zero, zero, zero, zero, zero, zero, zero, zero)
    for group in range(tl.program_id(0), LAST, tl.num_programs(0)):
        g = group % GROUPS
        b = (group // GROUPS).to(tl.int64)
        row = g * R + tl.arange(0, R)
        live = row < K
        clamped = tl.minimum(row, K - 1)
        bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
        pos = POS + b * N * 2
        # [R]
        survivor = tl.load(SURVIVORS + b * K + clamped)
        x_R, y_R = positions(pos, survivor)
        count = tl.load(COUNT + b * GROUPS + g)
        entry = ENTRY + (b * GROUPS + g) * ENTRIES
        for e0 in range(0, count, TILE):
            col, bits = read_columns(entry, e0, count, N, TILE)
            # Products of dz and features over all channels: gradients of the weights g, before the score
            dg0 = tl.zeros([R, J], tl.float32)
            dg1 = tl.zeros([R, J], tl.float32)
            dg2 = tl.zeros([R, J], tl.float32)
            dg3 = tl.zeros([R, J], tl.float32)
            for c0 in range(0, C, CB):
                channel = c0 + tl.arange(0, CB)
                real = (channel < C)[None, :]
                # [J, CB]
                feat = tl.load(FEAT + (b * N + col)[:, None] * C + channel[None, :], mask=real, other=0.0)
                feat = tl.permute(feat, (1, 0))
                # [R, CB] each
                at = DZ + (b * K + clamped)[:, None] * 4 * C + channel[None, :]
                dg0 = tl.dot(tl.load(at, mask=real, other=0.0), feat, dg0, input_precision=PREC)
                dg1 = tl.dot(tl.load(at + C, mask=real, other=0.0), feat, dg1, input_precision=PREC)
                dg2 = tl.dot(tl.load(at + 2 * C, mask=real, other=0.0), feat, dg2, input_precision=PREC)
                dg3 = tl.dot(tl.load(at + 3 * C, mask=real, other=0.0), feat, dg3, input_precision=PREC)
            # Back through GELU and LayerNorm, for every pair
            x_J, y_J = positions(pos, col)
            dx, dy = x_J[None, :] - x_R[:, None], y_J[None, :] - y_R[:, None]
            member = ((bits[None, :] & bit[:, None]) != 0) & live[:, None]
            # [J]
            share = tl.where(member, tl.load(SCORE + b * N + col)[None, :], 0.0)
            d, ry, rx = pair_geometry(dx, dy)
            h0, h1, h2, h3, rstd = _normalized(W, W_BIAS, dx, dy, d, ry, rx)
            du0, dh0 = _weight_gradient(LN, LN_BIAS, 0, h0, dg0 * share)
            du1, dh1 = _weight_gradient(LN, LN_BIAS, 1, h1, dg1 * share)
            du2, dh2 = _weight_gradient(LN, LN_BIAS, 2, h2, dg2 * share)
            du3, dh3 = _weight_gradient(LN, LN_BIAS, 3, h3, dg3 * share)
            mean = (dh0 + dh1 + dh2 + dh3) * 0.25
            along = (dh0 * h0 + dh1 * h1 + dh2 * h2 + dh3 * h3) * 0.25
            # The sums over the pairs
            total0 = _add(total0, du0, h0, rstd * (dh0 - mean - h0 * along), dx, dy, d, ry, rx, R, J)
            total1 = _add(total1, du1, h1, rstd * (dh1 - mean - h1 * along), dx, dy, d, ry, rx, R, J)
            total2 = _add(total2, du2, h2, rstd * (dh2 - mean - h2 * along), dx, dy, d, ry, rx, R, J)
            total3 = _add(total3, du3, h3, rstd * (dh3 - mean - h3 * along), dx, dy, d, ry, rx, R, J)
    part = PART + tl.program_id(0) * 32
    _store_sums(part, 0, total0)
    _store_sums(part, 1, total1)
    _store_sums(part, 2, total2)
    _store_sums(part, 3, total3)


# --- Launchers


def launch_config(kernel: Pass, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants: clusters of a tile, channels of a block, warps. fp32 products run on the ordinary units
    and need registers. The weights' gradient walks all channels itself: in longer strides a fifth faster on an H100."""
    if dtype == torch.float32:
        config = {"TILE": 2, "CB": 32, "num_warps": 4, "num_stages": 1}
    else:
        config = {"TILE": 4, "CB": 128 if kernel == "bwd_dweight" else 64, "num_warps": 4, "num_stages": 1}
    return {"R": GROUP, "PREC": precision_of(dtype), **config}


def _forward(
    feat: Tensor, score: Tensor, pos: Tensor, survivors: Tensor, lists: VisitLists, parameters: list[Tensor]
) -> Tensor:
    batch, tokens, channels = feat.shape
    count, rows = survivors.shape[1], lists.rows
    out = torch.empty(batch, count, 4 * channels, dtype=feat.dtype, device=feat.device)
    config = launch_config("fwd", feat.dtype)
    w, w_bias, ln, ln_bias = parameters
    _merging_fwd_kernel[(rows.count_BG.numel(), triton.cdiv(channels, config["CB"]))](
        FEAT=feat, SCORE=score, POS=pos, SURVIVORS=survivors, ENTRY=rows.entry_BGE, COUNT=rows.count_BG, W=w,
        W_BIAS=w_bias, LN=ln, LN_BIAS=ln_bias, OUT=out, N=tokens, K=count, ENTRIES=rows.entry_BGE.shape[2],
        GROUPS=rows.count_BG.shape[1], C=channels, **config,
    )  # fmt: skip
    return out


def _backward(
    dz: Tensor, feat: Tensor, score: Tensor, pos: Tensor, survivors: Tensor, lists: VisitLists, parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of features (in their dtype), score and the four parameters (fp32)."""
    batch, tokens, channels = feat.shape
    count = survivors.shape[1]
    w, w_bias, ln, ln_bias = parameters
    # Gradients of features and score, the latter in parts by block of channels
    keys = lists.keys
    config = launch_config("bwd_dfeat", feat.dtype)
    blocks = triton.cdiv(channels, config["CB"])
    dfeat = torch.empty_like(feat)
    dscore = torch.empty(blocks, batch, tokens, dtype=torch.float32, device=feat.device)
    _merging_bwd_dfeat_kernel[(keys.count_BG.numel(), blocks)](
        FEAT=feat, SCORE=score, POS=pos, SURVIVORS=survivors, ENTRY=keys.entry_BGE, COUNT=keys.count_BG, W=w,
        W_BIAS=w_bias, LN=ln, LN_BIAS=ln_bias, DZ=dz, DFEAT=dfeat, DSCORE=dscore, N=tokens, K=count,
        ENTRIES=keys.entry_BGE.shape[2], GROUPS=keys.count_BG.shape[1], C=channels, **config,
    )  # fmt: skip
    # Gradients of the parameters, one line of sums per program
    rows = lists.rows
    groups = rows.count_BG.numel()
    part = torch.empty(min(groups, WEIGHT_PROGRAMS), 32, dtype=torch.float32, device=feat.device)
    _merging_bwd_dweight_kernel[(len(part),)](
        FEAT=feat, SCORE=score, POS=pos, SURVIVORS=survivors, ENTRY=rows.entry_BGE, COUNT=rows.count_BG, W=w,
        W_BIAS=w_bias, LN=ln, LN_BIAS=ln_bias, DZ=dz, PART=part, N=tokens, K=count, ENTRIES=rows.entry_BGE.shape[2],
        GROUPS=rows.count_BG.shape[1], LAST=groups, C=channels, **launch_config("bwd_dweight", feat.dtype),
    )  # fmt: skip
    dw, dw_bias, dln, dln_bias = column_sums(part).split([20, 4, 4, 4])
    return dfeat, dscore[0] if blocks == 1 else dscore.sum(0), dw.view(4, 5), dw_bias, dln, dln_bias


class _MergeTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, score: Tensor, survivors: Tensor, near: Neighbourhoods, *parameters: Tensor
    ) -> Tensor:
        # The survivors' visit lists
        chosen = torch.gather(near.nearest_BNC, 1, survivors[..., None].expand(-1, -1, near.nearest_BNC.shape[2]))
        lists = build_visit_lists(chosen, near.count)
        feat, survivors = feat.contiguous(), survivors.contiguous()
        floats = [tensor.float().contiguous() for tensor in (score, *parameters)]
        ctx.save_for_backward(feat, survivors, *floats)
        ctx.pos, ctx.lists, ctx.dtypes = near.pos_BN2, lists, [tensor.dtype for tensor in (score, *parameters)]
        return _forward(feat, floats[0], near.pos_BN2, survivors, lists, floats[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        feat, survivors, score, *parameters = ctx.saved_tensors
        dfeat, *floats = _backward(dz.contiguous(), feat, score, ctx.pos, survivors, ctx.lists, parameters)
        dscore, *of_parameters = (d.to(dtype) for d, dtype in zip(floats, ctx.dtypes, strict=True))
        return dfeat, dscore, None, None, *of_parameters


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
    return _MergeTokens.apply(
        feat_BNC, score_BN, survivors_BK, neighbourhoods, weight_45, bias_4, norm_weight_4, norm_bias_4
    )
