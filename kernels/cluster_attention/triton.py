"""Cluster attention on tensor cores.

    logit_ij = q_i . k_j / sqrt(D) + w . (dx, dy, d, dy/d, dx/d) + c        logit_i,blank = q_i . k_blank / sqrt(D)

A group of 16 queries visits the union of its clusters (see neighbourhoods/visit_lists.py) in dense tiles of 32 keys; a
membership bit per (query, cluster) removes the pairs that are no neighbours, so the result is exact. For the gradients
of keys and values a group of 16 keys visits the transposed list: every program owns what it writes, nothing is atomic,
and the result has the same bits in every run.

What is unusual: arithmetic per pair costs more than the products and the memory traffic, so several heads share a
program and with it the geometry; membership (0 or -1e30) and bias start the accumulator of q . k; the factors 1/sqrt(D)
and log2(e) sit in the one multiplication before exp2, and c, which every pair of a row has, is subtracted from the
blank logit instead. The softmax starts from the blank token, so its maximum is always finite.

Saved for the backward pass: out and lse, the base-2 logarithm of the softmax's denominator relative to c.

Axes: B batch, N tokens, H heads, HB heads of a program, D head width, R = 16 rows of a group, J columns of a tile.
The grid is [H / HB, groups, B], which needs no divisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.pairs import pair_geometry, positions, read_columns
from affmae_kernels.neighbourhoods.visit_lists import GROUP, VisitList

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MEMBER = tl.constexpr(-1e30)
"""Start of the logit of a pair that are no neighbours: exp2 makes it exactly 0."""
SIZES = ["N", "ENTRIES", "H", "first_image"]
"""Differ from stage to stage; one compilation serves all."""
GRID_Z = 65_535
"""Most programs along the third axis of a grid, here images."""
Pass = Literal["fwd", "bwd_dq", "bwd_dkv"]


# --- Shared by the three kernels


@triton.jit
def _own_rows(POS, ENTRY, COUNT, N, ENTRIES, first_image, R: tl.constexpr, HB: tl.constexpr):
    """What a program owns: image b (int64), first head, rows [R] and the same clamped into the image; then the image's
    positions (pointer), x and y of the rows, the entries to visit (pointer) and their number."""
    b = (tl.program_id(2) + first_image).to(tl.int64)
    h0 = tl.program_id(0) * HB
    row = tl.program_id(1) * R + tl.arange(0, R)
    clamped = tl.minimum(row, N - 1)
    pos = POS + b * N * 2
    x_R, y_R = positions(pos, clamped)
    group = b * tl.num_programs(1) + tl.program_id(1)
    return b, h0, row, clamped, pos, x_R, y_R, ENTRY + group * ENTRIES, tl.load(COUNT + group)


@triton.jit
def _load_bias(WEIGHT, BIAS, heads, inverse_scale):
    """w / scale, five of [HB, 1, 1], and c / scale, [HB, 1]."""
    p = WEIGHT + heads * 5
    # [HB] each
    w0 = (tl.load(p) * inverse_scale)[:, None, None]
    w1 = (tl.load(p + 1) * inverse_scale)[:, None, None]
    w2 = (tl.load(p + 2) * inverse_scale)[:, None, None]
    w3 = (tl.load(p + 3) * inverse_scale)[:, None, None]
    w4 = (tl.load(p + 4) * inverse_scale)[:, None, None]
    c = (tl.load(BIAS + heads) * inverse_scale)[:, None]
    return w0, w1, w2, w3, w4, c


@triton.jit
def _start(w0, w1, w2, w3, w4, dx, dy, member):
    """Start of q . k, the bias or `NO_MEMBER`, [HB, R, J]; then dx, dy, d, dy/d, dx/d, each [1, R, J]."""
    d, ry, rx = pair_geometry(dx, dy)
    offset = tl.where(member, 0.0, NO_MEMBER)
    dx, dy, d, ry, rx, offset = dx[None], dy[None], d[None], ry[None], rx[None], offset[None]
    return w4 * rx + (w3 * ry + (w2 * d + (w1 * dy + (w0 * dx + offset)))), dx, dy, d, ry, rx


# --- Kernels


@triton.jit(do_not_specialize=SIZES)
def _attention_fwd_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, BLANK_KEY, BLANK_VALUE, OUT, LSE, scale, N, ENTRIES, H, first_image,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: out and lse of one group of queries, HB heads."""
    b, h0, row, clamped, pos, x_R, y_R, entry, count = _own_rows(POS, ENTRY, COUNT, N, ENTRIES, first_image, R, HB)
    heads = h0 + tl.arange(0, HB)
    bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
    stride = 3 * H * D
    qkv = QKV + b * N * stride + h0 * D
    channel = tl.arange(0, HB)[:, None, None] * D + tl.arange(0, D)[None, None, :]  # [HB, 1, D], from h0 on
    # [HB, R, D]
    q = tl.load(qkv + clamped[None, :, None] * stride + channel)
    # [HB, D]
    head = heads[:, None] * D + tl.arange(0, D)[None, :]
    blank_key = tl.load(BLANK_KEY + head)[:, None, :]
    blank_value = tl.load(BLANK_VALUE + head)[:, None, :]
    w0, w1, w2, w3, w4, c = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    scale2 = scale * LOG2_E
    # The softmax so far: maximum, denominator and weighted sum, of the blank token alone
    m = tl.sum(q.to(tl.float32) * blank_key, 2) - c  # [HB, R]
    total = tl.full([HB, R], 1.0, tl.float32)
    acc = tl.zeros([HB, R, D], tl.float32) + blank_value
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + channel
        # [HB, J, D]
        k = tl.load(qkv + H * D + at)
        v = tl.load(qkv + 2 * H * D + at)
        x_J, y_J = positions(pos, col)
        dx, dy = x_J[None, :] - x_R[:, None], y_J[None, :] - y_R[:, None]
        start = _start(w0, w1, w2, w3, w4, dx, dy, (bits[None, :] & bit[:, None]) != 0)[0]
        s = tl.dot(q, tl.permute(k, (0, 2, 1)), start, input_precision=PREC)  # [HB, R, J]
        m_new = tl.maximum(m, tl.max(s, 2))
        m_2 = m_new * scale2
        p = tl.exp2(s * scale2 - m_2[:, :, None])
        shrink = tl.exp2(m * scale2 - m_2)
        total = total * shrink + tl.sum(p, 2)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, :, None], input_precision=PREC)
        m = m_new
    live = row < N
    out = OUT + (b * N * H + h0) * D + row[None, :, None] * (H * D) + channel
    tl.store(out, (acc / total[:, :, None]).to(OUT.dtype.element_ty), mask=live[None, :, None])
    tl.store(LSE + (b * H + heads[:, None]) * N + row[None, :], m * scale2 + tl.log2(total), mask=live[None, :])


@triton.jit
def _lane_sums(x, HB: tl.constexpr, R: tl.constexpr, J: tl.constexpr):
    """[HB, R, J] -> [HB, R / 2, 4]: sums over the rows r and r + R / 2 and over the columns that lie in one lane, so that
    nothing is exchanged between lanes in the loop."""
    lanes = tl.reshape(x, (HB, 2, R // 2, J // 8, 4, 2))
    return tl.sum(tl.sum(tl.sum(lanes, 5), 3), 1)


@triton.jit(do_not_specialize=SIZES)
def _attention_bwd_dq_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, BLANK_KEY, BLANK_VALUE, OUT, LSE, DOUT, DQKV, DELTA, PART, scale, N, ENTRIES,
    H, first_image, LINE,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one group of queries, HB heads. With p the softmax and delta_i = dout_i . out_i

        ds = p * (dout . v - delta),   dq = ds K / sqrt(D),   dw = sum ds * geometry,   dc = sum ds

    The sums over the group go to a row of PART [B * groups, LINE]: d blank_key, d blank_value, dq and dout [H, D],
    dw [H, 5], dc [H].
    """
    b, h0, row, clamped, pos, x_R, y_R, entry, count = _own_rows(POS, ENTRY, COUNT, N, ENTRIES, first_image, R, HB)
    heads = h0 + tl.arange(0, HB)
    bit = tl.full([R], 1, tl.int32) << tl.arange(0, R)
    live = row < N
    stride = 3 * H * D
    qkv = QKV + b * N * stride + h0 * D
    channel = tl.arange(0, HB)[:, None, None] * D + tl.arange(0, D)[None, None, :]  # [HB, 1, D], from h0 on
    own = (b * N * H + h0) * D + row[None, :, None] * (H * D) + channel
    # [HB, R, D]; rows beyond the end are 0 in dout, and with it all their terms
    q = tl.load(qkv + clamped[None, :, None] * stride + channel)
    dout = tl.load(DOUT + own, mask=live[None, :, None], other=0.0)
    out = tl.load(OUT + own, mask=live[None, :, None], other=0.0)
    # [HB, R]
    stat = (b * H + heads[:, None]) * N
    lse = tl.load(LSE + stat + clamped[None, :])
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 2)
    tl.store(DELTA + stat + row[None, :], delta, mask=live[None, :])
    # The blank token: its part of dq starts the sum over the keys
    # [HB, D]
    head = heads[:, None] * D + tl.arange(0, D)[None, :]
    blank_key = tl.load(BLANK_KEY + head)[:, None, :]
    blank_value = tl.load(BLANK_VALUE + head)[:, None, :]
    w0, w1, w2, w3, w4, c = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    scale2 = scale * LOG2_E
    p_blank = tl.exp2((tl.sum(q.to(tl.float32) * blank_key, 2) - c) * scale2 - lse)
    ds_blank = p_blank * (tl.sum(dout.to(tl.float32) * blank_value, 2) - delta)
    dq = ds_blank[:, :, None] * blank_key
    part = PART + (b * tl.num_programs(1) + tl.program_id(1)) * LINE
    tl.store(part + head, tl.sum(ds_blank[:, :, None] * q.to(tl.float32), 1) * scale)
    tl.store(part + H * D + head, tl.sum(p_blank[:, :, None] * dout.to(tl.float32), 1))
    # A row's gradients of the logits sum to zero, and all but the blank one have c
    tl.store(part + 4 * H * D + 5 * H + heads, -tl.sum(ds_blank, 1))
    tl.store(part + 3 * H * D + head, tl.sum(dout.to(tl.float32), 1))
    J: tl.constexpr = TILE * 8
    g0 = tl.zeros([HB, R // 2, 4], tl.float32)
    g1 = tl.zeros([HB, R // 2, 4], tl.float32)
    g2 = tl.zeros([HB, R // 2, 4], tl.float32)
    g3 = tl.zeros([HB, R // 2, 4], tl.float32)
    g4 = tl.zeros([HB, R // 2, 4], tl.float32)
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + channel
        # [HB, J, D]
        k = tl.load(qkv + H * D + at)
        v = tl.load(qkv + 2 * H * D + at)
        x_J, y_J = positions(pos, col)
        dx, dy = x_J[None, :] - x_R[:, None], y_J[None, :] - y_R[:, None]
        member = (bits[None, :] & bit[:, None]) != 0
        start, dx, dy, d, ry, rx = _start(w0, w1, w2, w3, w4, dx, dy, member)
        s = tl.dot(q, tl.permute(k, (0, 2, 1)), start, input_precision=PREC)  # [HB, R, J]
        p = tl.exp2(s * scale2 - lse[:, :, None])
        ds = p * (tl.dot(dout, tl.permute(v, (0, 2, 1)), input_precision=PREC) - delta[:, :, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)
        g0 += _lane_sums(ds * dx, HB, R, J)
        g1 += _lane_sums(ds * dy, HB, R, J)
        g2 += _lane_sums(ds * d, HB, R, J)
        g3 += _lane_sums(ds * ry, HB, R, J)
        g4 += _lane_sums(ds * rx, HB, R, J)
    dq *= scale
    dq_at = DQKV + b * N * stride + h0 * D + row[None, :, None] * stride + channel
    tl.store(dq_at, dq.to(DQKV.dtype.element_ty), mask=live[None, :, None])
    tl.store(part + 2 * H * D + head, tl.sum(dq, 1))
    dw = part + 4 * H * D + heads * 5
    tl.store(dw, tl.sum(tl.sum(g0, 2), 1))
    tl.store(dw + 1, tl.sum(tl.sum(g1, 2), 1))
    tl.store(dw + 2, tl.sum(tl.sum(g2, 2), 1))
    tl.store(dw + 3, tl.sum(tl.sum(g3, 2), 1))
    tl.store(dw + 4, tl.sum(tl.sum(g4, 2), 1))


@triton.jit(do_not_specialize=SIZES)
def _attention_bwd_dkv_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, LSE, DOUT, DQKV, DELTA, scale, N, ENTRIES, H, first_image,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dk = ds^T Q / sqrt(D) and dv = p^T dout of one group of keys, HB heads. The columns are the queries
    of the row clusters that visit the group."""
    b, h0, row, clamped, pos, x_R, y_R, entry, count = _own_rows(POS, ENTRY, COUNT, N, ENTRIES, first_image, R, HB)
    heads = h0 + tl.arange(0, HB)
    # The byte of this key's cluster; the query's bit in it is shifted down
    bit = tl.full([R], 1, tl.int32) << (8 * (tl.arange(0, R) // 8))
    stride = 3 * H * D
    qkv = QKV + b * N * stride + h0 * D
    do = DOUT + (b * N * H + h0) * D
    stat = (b * H + heads[:, None]) * N
    channel = tl.arange(0, HB)[:, None, None] * D + tl.arange(0, D)[None, None, :]  # [HB, 1, D], from h0 on
    # [HB, R, D]
    k = tl.load(qkv + H * D + clamped[None, :, None] * stride + channel)
    v = tl.load(qkv + 2 * H * D + clamped[None, :, None] * stride + channel)
    w0, w1, w2, w3, w4, _ = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    scale2 = scale * LOG2_E
    dk = tl.zeros([HB, R, D], tl.float32)
    dv = tl.zeros([HB, R, D], tl.float32)
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = read_columns(entry, e0, count, N, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        # [HB, J, D]
        q = tl.load(qkv + col[None, :, None] * stride + channel)
        dout = tl.load(do + col[None, :, None] * (H * D) + channel)
        x_J, y_J = positions(pos, col)
        # [HB, J]
        lse = tl.load(LSE + stat + col[None, :])
        delta = tl.load(DELTA + stat + col[None, :])
        dx, dy = x_R[:, None] - x_J[None, :], y_R[:, None] - y_J[None, :]
        start = _start(w0, w1, w2, w3, w4, dx, dy, (bits[None, :] & bit[:, None]) != 0)[0]
        s = tl.dot(k, tl.permute(q, (0, 2, 1)), start, input_precision=PREC)  # [HB, R keys, J queries]
        p = tl.exp2(s * scale2 - lse[:, None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.permute(dout, (0, 2, 1)), input_precision=PREC) - delta[:, None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC)
    live = row < N
    at = DQKV + b * N * stride + (H + h0) * D + row[None, :, None] * stride + channel
    tl.store(at, (dk * scale).to(DQKV.dtype.element_ty), mask=live[None, :, None])
    tl.store(at + H * D, dv.to(DQKV.dtype.element_ty), mask=live[None, :, None])


# --- Launchers


def launch_config(kernel: Pass, heads: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of a kernel: heads of a program (HB), clusters of a tile (TILE), warps, pipeline depth,
    and a limit on registers.

    The fastest of some 150 that were measured on an H100 at the base network's stages. What counts is how many warps a
    multiprocessor holds: two heads of width 32 and one warp. The query gradient would take 230 registers; held to 184
    it is a tenth faster and spills none. fp32 products run on the ordinary units and need registers.
    """
    together = 2 if heads % 2 == 0 and width <= 32 else 1
    if dtype == torch.float32:
        config = {"HB": 1, "TILE": 2, "num_warps": 4 if width == 64 else 2, "num_stages": 1}
    elif kernel == "fwd":
        config = {"HB": together, "TILE": 4, "num_warps": 1, "num_stages": 3}
    else:
        config = {"HB": together, "TILE": 2, "num_warps": 1, "num_stages": 2}
        if kernel == "bwd_dq" and together == 2 and width == 32:
            config["maxnreg"] = 184
    return {"R": GROUP, "D": width, "PREC": precision_of(dtype), "STAGES": config["num_stages"], **config}


def _launches(qkv: Tensor, side: VisitList, config: dict[str, Any]) -> Iterator[tuple[tuple[int, int, int], int]]:
    """(grid, first image): one launch, or several where a grid cannot hold all images."""
    batch, _, _, heads, _ = qkv.shape
    for first in range(0, batch, GRID_Z):
        yield (heads // config["HB"], side.count_BG.shape[1], min(GRID_Z, batch - first)), first


def forward(
    qkv_BN3HD: Tensor,
    near: Neighbourhoods,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
) -> tuple[Tensor, Tensor]:
    """The forward pass without autograd.

    Args:
        qkv_BN3HD: contiguous, of a dtype that the kernels take.
        near: neighbourhoods that the kernels take.
        bias_weight_H5, bias_H, blank_key_HD, blank_value_HD: contiguous fp32.

    Returns:
        out_BNHD in the dtype of qkv, and lse_BHN (fp32), which the backward pass needs.
    """
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    out_BNHD = torch.empty(batch, tokens, heads, width, dtype=qkv_BN3HD.dtype, device=qkv_BN3HD.device)
    lse_BHN = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv_BN3HD.device)
    side = near.visit_lists.rows
    config = launch_config("fwd", heads, width, qkv_BN3HD.dtype)
    for grid, first in _launches(qkv_BN3HD, side, config):
        _attention_fwd_kernel[grid](
            QKV=qkv_BN3HD, POS=near.pos_BN2, ENTRY=side.entry_BGE, COUNT=side.count_BG, WEIGHT=bias_weight_H5,
            BIAS=bias_H, BLANK_KEY=blank_key_HD, BLANK_VALUE=blank_value_HD, OUT=out_BNHD, LSE=lse_BHN,
            scale=width**-0.5, N=tokens, ENTRIES=side.entry_BGE.shape[2], H=heads, first_image=first, **config,
        )  # fmt: skip
    return out_BNHD, lse_BHN


def backward(
    dout_BNHD: Tensor,
    qkv_BN3HD: Tensor,
    near: Neighbourhoods,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
    out_BNHD: Tensor,
    lse_BHN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass without autograd.

    Args:
        dout_BNHD: contiguous, in the dtype of `out_BNHD`.
        the others: arguments and results of `forward`.

    Returns:
        dqkv_BN3HD in the dtype of qkv, and in fp32 dbias_weight_H5, dbias_H, dblank_key_HD, dblank_value_HD, dq_sum_HD
        and dout_sum_HD. The last two are sums over tokens and images of the queries' gradients, before they are rounded,
        and of dout; they spare a pass over dqkv for the gradient of the projection's bias. The fp32 ones share memory.
    """
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    dqkv_BN3HD, delta_BHN = torch.empty_like(qkv_BN3HD), torch.empty_like(lse_BHN)
    # Gradients of queries, and of parameters group by group
    rows = near.visit_lists.rows
    sizes = [*[heads * width] * 4, heads * 5, heads]
    line = 16 * triton.cdiv(sum(sizes), 16)  # a multiple of 16 makes loads wide when the rows are summed
    part_GL = torch.empty(rows.count_BG.numel(), line, dtype=torch.float32, device=qkv_BN3HD.device)
    config = launch_config("bwd_dq", heads, width, qkv_BN3HD.dtype)
    for grid, first in _launches(qkv_BN3HD, rows, config):
        _attention_bwd_dq_kernel[grid](
            QKV=qkv_BN3HD, POS=near.pos_BN2, ENTRY=rows.entry_BGE, COUNT=rows.count_BG, WEIGHT=bias_weight_H5,
            BIAS=bias_H, BLANK_KEY=blank_key_HD, BLANK_VALUE=blank_value_HD, OUT=out_BNHD, LSE=lse_BHN, DOUT=dout_BNHD,
            DQKV=dqkv_BN3HD, DELTA=delta_BHN, PART=part_GL, scale=width**-0.5, N=tokens,
            ENTRIES=rows.entry_BGE.shape[2], H=heads, first_image=first, LINE=line, **config,
        )  # fmt: skip
    # Gradients of keys and values
    keys = near.visit_lists.keys
    config = launch_config("bwd_dkv", heads, width, qkv_BN3HD.dtype)
    for grid, first in _launches(qkv_BN3HD, keys, config):
        _attention_bwd_dkv_kernel[grid](
            QKV=qkv_BN3HD, POS=near.pos_BN2, ENTRY=keys.entry_BGE, COUNT=keys.count_BG, WEIGHT=bias_weight_H5,
            BIAS=bias_H, LSE=lse_BHN, DOUT=dout_BNHD, DQKV=dqkv_BN3HD, DELTA=delta_BHN, scale=width**-0.5, N=tokens,
            ENTRIES=keys.entry_BGE.shape[2], H=heads, first_image=first, **config,
        )  # fmt: skip
    *per_channel, dweight, dbias = column_sums(part_GL)[: sum(sizes)].split(sizes)
    dkey, dvalue, dq_sum, dout_sum = (total.view(heads, width) for total in per_channel)
    return dqkv_BN3HD, dweight.view(heads, 5), dbias, dkey, dvalue, dq_sum, dout_sum


class _ClusterAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        near: Neighbourhoods,
        weight: Tensor,
        bias: Tensor,
        blank_key: Tensor,
        blank_value: Tensor,
    ) -> Tensor:
        qkv = qkv.contiguous()
        parameters = [tensor.float().contiguous() for tensor in (weight, bias, blank_key, blank_value)]
        out, lse = forward(qkv, near, *parameters)
        ctx.save_for_backward(qkv, *parameters, out, lse)
        ctx.near, ctx.dtypes = near, [tensor.dtype for tensor in (weight, bias, blank_key, blank_value)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *kept = ctx.saved_tensors
        dqkv, *of_parameters, _, _ = backward(dout.contiguous(), qkv, ctx.near, *kept)
        return dqkv, None, *(d.to(dtype) for d, dtype in zip(of_parameters, ctx.dtypes, strict=True))


def cluster_attention(
    qkv_BN3HD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
) -> Tensor:
    """See the package for the formula and the shapes."""
    return _ClusterAttention.apply(qkv_BN3HD, neighbourhoods, bias_weight_H5, bias_H, blank_key_HD, blank_value_HD)
