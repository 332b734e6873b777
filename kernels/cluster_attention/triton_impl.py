"""Cluster attention on tensor cores: forward, its gradients, and both as operators of PyTorch.

    logit_ij = q_i . k_j / sqrt(D) + w . (dx, dy, d, dy/d, dx/d) + c        logit_i,blank = q_i . k_blank / sqrt(D)

A group of 16 queries walks the union of its clusters (see neighbourhoods/walks.py) in dense tiles of 32 keys; a
membership bit per (query, cluster) removes the pairs that are no neighbours, so the result is exact. For the gradients
of keys and values a group of 16 keys walks the transposed list: every program owns what it writes, nothing is atomic,
and the result has the same bits in every run.

What is unusual: arithmetic per pair costs more than the products and the memory traffic, so several heads share a
program and with it the geometry; membership (0 or -1e30) and bias start the accumulator of q . k; the factors 1/sqrt(D)
and log2(e) sit in the one multiplication before exp2, and c, which every pair of a row has, is taken off the blank
logit instead. The softmax starts from the blank token, so its maximum is always finite.

Saved for the backward pass: out and lse, the base-2 logarithm of the softmax's denominator relative to c.
Axes: B batch, G groups, A heads, HB heads of a program, R = 16 rows of a group, J = 32 columns of a tile, D head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.column_sums import column_sums
from affmae_kernels.launch import precision_of
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.walks import GROUP

Pass = Literal["forward", "query", "key"]
"""The forward pass, the gradient of the queries, that of keys and values."""
_SIZES = ["N", "ENTRIES", "GROUPS", "A"]
"""Differ from stage to stage; one compilation serves all."""


def launch_options(heads: int, width: int, dtype: torch.dtype, kernel: Pass) -> dict[str, int]:
    """Heads of a program (HB), clusters of a tile (TILE), warps, pipeline depth, and a limit on registers.

    The fastest of some 150 that were measured on an H100 at the base network's stages. What counts is how many warps a
    multiprocessor holds: two heads of width 32 and one warp. The query gradient would take 230 registers; held to 184
    it is a tenth faster and spills none. fp32 products run on the ordinary units and need registers.
    """
    if dtype == torch.float32:
        return {"HB": 1, "TILE": 2, "num_warps": 4 if width == 64 else 2, "num_stages": 1}
    together = 2 if heads % 2 == 0 and width <= 32 else 1
    if kernel == "forward":
        return {"HB": together, "TILE": 4, "num_warps": 1, "num_stages": 3}
    options = {"HB": together, "TILE": 2, "num_warps": 1, "num_stages": 2}
    return options | {"maxnreg": 184} if kernel == "query" and together == 2 and width == 32 else options


@triton.jit
def _read_columns(ENTRY, e0, count, N, TILE: tl.constexpr):
    """Rows (clamped into the image) and membership bits of the members of TILE listed clusters."""
    j = tl.arange(0, TILE * 8)
    slot = e0 + j // 8
    entry = tl.load(ENTRY + slot, mask=slot < count, other=0)
    row = (entry >> 16) * 8 + j % 8
    bits = tl.where(row < N, entry & 0xFFFF, 0)  # a short last cluster has no such member
    return tl.minimum(row, N - 1), bits


@triton.jit
def _geometry(x_R, y_R, x_J, y_J, member_RJ, SIGN: tl.constexpr):
    """0 or -1e30 for (non-)members, then dx, dy, d, dy/d, dx/d from query to key, each [1, R, J].

    SIGN: 1 when the rows are queries, -1 when they are keys. Distances are 0 or at least 1, so the lower bound only
    keeps rsqrt finite at 0, where dx and dy make d and both ratios exactly 0.
    """
    dx = (x_J[None, :] - x_R[:, None]) * SIGN
    dy = (y_J[None, :] - y_R[:, None]) * SIGN
    square = dx * dx + dy * dy
    inverse = tl.rsqrt(tl.maximum(square, 0.5))
    offset = tl.where(member_RJ, 0.0, -1e30)
    return offset[None], dx[None], dy[None], (square * inverse)[None], (dy * inverse)[None], (dx * inverse)[None]


@triton.jit
def _load_bias(WEIGHT, BIAS, heads, inverse_scale):
    """w / scale, five of [HB, 1, 1], and c / scale, [HB, 1]."""
    p = WEIGHT + heads * 5
    w0 = (tl.load(p) * inverse_scale)[:, None, None]
    w1 = (tl.load(p + 1) * inverse_scale)[:, None, None]
    w2 = (tl.load(p + 2) * inverse_scale)[:, None, None]
    w3 = (tl.load(p + 3) * inverse_scale)[:, None, None]
    w4 = (tl.load(p + 4) * inverse_scale)[:, None, None]
    return w0, w1, w2, w3, w4, (tl.load(BIAS + heads) * inverse_scale)[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _attention_forward_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, BLANK_K, BLANK_V, OUT, LSE, scale, N, ENTRIES, GROUPS, A,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: out and lse of one group of queries, HB heads."""
    pid = tl.program_id(0)
    h0 = (pid % (A // HB)) * HB
    g = (pid // (A // HB)) % GROUPS
    b = (pid // (A // HB * GROUPS)).to(tl.int64)
    i = tl.arange(0, R)
    heads = h0 + tl.arange(0, HB)
    row = g * R + i
    live = row < N
    row_c = tl.minimum(row, N - 1)
    d = tl.arange(0, D)
    stride = 3 * A * D
    q_ptr = QKV + b * N * stride + h0 * D
    pos = POS + b * N * 2
    hd = tl.arange(0, HB)[:, None, None] * D + d[None, None, :]
    q = tl.load(q_ptr + row_c[None, :, None] * stride + hd)  # [HB, R, D]
    x_R = tl.load(pos + row_c * 2).to(tl.float32)
    y_R = tl.load(pos + row_c * 2 + 1).to(tl.float32)
    w0, w1, w2, w3, w4, c = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    bit = tl.full([R], 1, tl.int32) << i
    blank_k = tl.load(BLANK_K + heads[:, None] * D + d[None, :])
    blank_v = tl.load(BLANK_V + heads[:, None] * D + d[None, :])
    scale2 = scale * 1.4426950408889634
    m = tl.sum(q.to(tl.float32) * blank_k[:, None, :], 2) - c  # [HB, R]
    total = tl.full([HB, R], 1.0, tl.float32)
    acc = tl.zeros([HB, R, D], tl.float32) + blank_v[:, None, :]
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = _read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + hd
        k = tl.load(q_ptr + A * D + at)  # [HB, J, D]
        v = tl.load(q_ptr + 2 * A * D + at)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        o, dx, dy, dist, ry, rx = _geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, 1)
        start = w4 * rx + (w3 * ry + (w2 * dist + (w1 * dy + (w0 * dx + o))))
        s = tl.dot(q, tl.permute(k, (0, 2, 1)), start, input_precision=PREC)  # [HB, R, J]
        m_new = tl.maximum(m, tl.max(s, 2))
        m_2 = m_new * scale2
        p = tl.exp2(s * scale2 - m_2[:, :, None])
        shrink = tl.exp2(m * scale2 - m_2)
        total = total * shrink + tl.sum(p, 2)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, :, None], input_precision=PREC)
        m = m_new
    out = OUT + (b * N * A + h0) * D + row[None, :, None] * (A * D) + hd
    tl.store(out, (acc / total[:, :, None]).to(OUT.dtype.element_ty), mask=live[None, :, None])
    tl.store(LSE + (b * A + heads[:, None]) * N + row[None, :], m * scale2 + tl.log2(total), mask=live[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _attention_query_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, BLANK_K, BLANK_V, OUT, LSE, DOUT, DQKV, DELTA, PART, scale, N, ENTRIES,
    GROUPS, A, LINE,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one group of queries, HB heads. With p the softmax and delta_i = dout_i . out_i

        ds = p * (dout . v - delta),   dq = ds K / sqrt(D),   dw = sum ds * geometry,   dc = sum ds

    The parameters' sums over the group go to a row of PART [B * G, LINE]: d blank_k and d blank_v [A, D], dw [A, 5],
    dc [A].
    """
    pid = tl.program_id(0)
    h0 = (pid % (A // HB)) * HB
    g = (pid // (A // HB)) % GROUPS
    b = (pid // (A // HB * GROUPS)).to(tl.int64)
    i = tl.arange(0, R)
    heads = h0 + tl.arange(0, HB)
    row = g * R + i
    live = row < N
    row_c = tl.minimum(row, N - 1)
    d = tl.arange(0, D)
    stride = 3 * A * D
    q_ptr = QKV + b * N * stride + h0 * D
    pos = POS + b * N * 2
    hd = tl.arange(0, HB)[:, None, None] * D + d[None, None, :]
    q = tl.load(q_ptr + row_c[None, :, None] * stride + hd)
    out_at = (b * N * A + h0) * D + row[None, :, None] * (A * D) + hd
    do = tl.load(DOUT + out_at, mask=live[None, :, None], other=0.0)  # rows beyond the end: all their terms are 0
    out = tl.load(OUT + out_at, mask=live[None, :, None], other=0.0)
    stat = (b * A + heads[:, None]) * N
    lse = tl.load(LSE + stat + row_c[None, :])
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 2)
    tl.store(DELTA + stat + row[None, :], delta, mask=live[None, :])
    x_R = tl.load(pos + row_c * 2).to(tl.float32)
    y_R = tl.load(pos + row_c * 2 + 1).to(tl.float32)
    w0, w1, w2, w3, w4, c = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    bit = tl.full([R], 1, tl.int32) << i
    scale2 = scale * 1.4426950408889634
    blank_k = tl.load(BLANK_K + heads[:, None] * D + d[None, :])
    blank_v = tl.load(BLANK_V + heads[:, None] * D + d[None, :])
    p_blank = tl.exp2((tl.sum(q.to(tl.float32) * blank_k[:, None, :], 2) - c) * scale2 - lse)
    ds_blank = p_blank * (tl.sum(do.to(tl.float32) * blank_v[:, None, :], 2) - delta)
    dq = ds_blank[:, :, None] * blank_k[:, None, :]
    part = PART + (b * GROUPS + g) * LINE
    blank = part + heads[:, None] * D + d[None, :]
    tl.store(blank, tl.sum(ds_blank[:, :, None] * q.to(tl.float32), 1) * scale)
    tl.store(blank + A * D, tl.sum(p_blank[:, :, None] * do.to(tl.float32), 1))
    g0 = tl.zeros([HB, R], tl.float32)
    g1 = tl.zeros([HB, R], tl.float32)
    g2 = tl.zeros([HB, R], tl.float32)
    g3 = tl.zeros([HB, R], tl.float32)
    g4 = tl.zeros([HB, R], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = _read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + hd
        k = tl.load(q_ptr + A * D + at)
        v = tl.load(q_ptr + 2 * A * D + at)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        o, dx, dy, dist, ry, rx = _geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, 1)
        start = w4 * rx + (w3 * ry + (w2 * dist + (w1 * dy + (w0 * dx + o))))
        s = tl.dot(q, tl.permute(k, (0, 2, 1)), start, input_precision=PREC)
        p = tl.exp2(s * scale2 - lse[:, :, None])
        ds = p * (tl.dot(do, tl.permute(v, (0, 2, 1)), input_precision=PREC) - delta[:, :, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)
        g0 += tl.sum(ds * dx, 2)
        g1 += tl.sum(ds * dy, 2)
        g2 += tl.sum(ds * dist, 2)
        g3 += tl.sum(ds * ry, 2)
        g4 += tl.sum(ds * rx, 2)
    dq_at = DQKV + b * N * stride + h0 * D + row[None, :, None] * stride + hd
    tl.store(dq_at, (dq * scale).to(DQKV.dtype.element_ty), mask=live[None, :, None])
    dw = part + 2 * A * D + heads * 5
    tl.store(dw, tl.sum(g0, 1))
    tl.store(dw + 1, tl.sum(g1, 1))
    tl.store(dw + 2, tl.sum(g2, 1))
    tl.store(dw + 3, tl.sum(g3, 1))
    tl.store(dw + 4, tl.sum(g4, 1))
    tl.store(part + 2 * A * D + 5 * A + heads, -tl.sum(ds_blank, 1))  # the logits' gradients of a softmax sum to zero


@triton.jit(do_not_specialize=_SIZES)
def _attention_key_kernel(
    QKV, POS, ENTRY, COUNT, WEIGHT, BIAS, LSE, DOUT, DQKV, DELTA, scale, N, ENTRIES, GROUPS, A,
    R: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dk = ds^T Q / sqrt(D) and dv = p^T dout of one group of keys, HB heads. The columns are the queries
    of the row clusters that visit the group."""
    pid = tl.program_id(0)
    h0 = (pid % (A // HB)) * HB
    g = (pid // (A // HB)) % GROUPS
    b = (pid // (A // HB * GROUPS)).to(tl.int64)
    i = tl.arange(0, R)
    heads = h0 + tl.arange(0, HB)
    row = g * R + i
    live = row < N
    row_c = tl.minimum(row, N - 1)
    d = tl.arange(0, D)
    stride = 3 * A * D
    q_ptr = QKV + b * N * stride + h0 * D
    do_ptr = DOUT + (b * N * A + h0) * D
    pos = POS + b * N * 2
    hd = tl.arange(0, HB)[:, None, None] * D + d[None, None, :]
    k = tl.load(q_ptr + A * D + row_c[None, :, None] * stride + hd)
    v = tl.load(q_ptr + 2 * A * D + row_c[None, :, None] * stride + hd)
    x_R = tl.load(pos + row_c * 2).to(tl.float32)
    y_R = tl.load(pos + row_c * 2 + 1).to(tl.float32)
    w0, w1, w2, w3, w4, _c = _load_bias(WEIGHT, BIAS, heads, 1 / scale)
    bit = tl.full([R], 1, tl.int32) << (8 * (i // 8))  # the byte of this key's cluster; the query's bit is shifted down
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros([HB, R, D], tl.float32)
    dv = tl.zeros([HB, R, D], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    stat = (b * A + heads[:, None]) * N
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = _read_columns(entry, e0, count, N, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        q = tl.load(q_ptr + col[None, :, None] * stride + hd)
        do = tl.load(do_ptr + col[None, :, None] * (A * D) + hd)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        lse = tl.load(LSE + stat + col[None, :])
        delta = tl.load(DELTA + stat + col[None, :])
        o, dx, dy, dist, ry, rx = _geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, -1)
        start = w4 * rx + (w3 * ry + (w2 * dist + (w1 * dy + (w0 * dx + o))))
        s = tl.dot(k, tl.permute(q, (0, 2, 1)), start, input_precision=PREC)  # [HB, R keys, J queries]
        p = tl.exp2(s * scale2 - lse[:, None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.permute(do, (0, 2, 1)), input_precision=PREC) - delta[:, None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC)
    at = DQKV + b * N * stride + h0 * D + A * D + row[None, :, None] * stride + hd
    tl.store(at, (dk * scale).to(DQKV.dtype.element_ty), mask=live[None, :, None])
    tl.store(at + A * D, dv.to(DQKV.dtype.element_ty), mask=live[None, :, None])


def _launch(
    qkv: Tensor, entry: Tensor, count: Tensor, kernel: Pass
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, trailing arguments and constants of one of the three kernels."""
    _, tokens, _, heads, width = qkv.shape
    options = launch_options(heads, width, qkv.dtype, kernel)
    grid = (count.numel() * (heads // options["HB"]),)
    sizes = (width**-0.5, tokens, entry.shape[2], count.shape[1], heads)
    constants = {"R": GROUP, "D": width, "PREC": precision_of(qkv.dtype), "STAGES": options["num_stages"]}
    return grid, sizes, constants | options


@torch.library.custom_op("affmae::cluster_attention", mutates_args=())
def attend(
    qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    grid, sizes, constants = _launch(qkv, row_entry, row_count, "forward")
    _attention_forward_kernel[grid](
        qkv, pos, row_entry, row_count, weight, bias, blank_key, blank_value, out, lse, *sizes, **constants
    )
    return out, lse


@attend.register_fake
def _(
    qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, width)
    return out, qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def launch_backward(
    dout: Tensor, qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, weight, bias, blank_key and blank_value; the last four share memory."""
    heads, width = qkv.shape[3:]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    line = 16 * triton.cdiv(heads * (2 * width + 6), 16)  # wide loads when its rows are summed
    part = torch.empty(row_count.numel(), line, dtype=torch.float32, device=qkv.device)
    grid, sizes, constants = _launch(qkv, row_entry, row_count, "query")
    _attention_query_kernel[grid](
        qkv, pos, row_entry, row_count, weight, bias, blank_key, blank_value, out, lse, dout, dqkv, delta, part, *sizes,
        line, **constants,
    )  # fmt: skip
    grid, sizes, constants = _launch(qkv, key_entry, key_count, "key")
    _attention_key_kernel[grid](
        qkv, pos, key_entry, key_count, weight, bias, lse, dout, dqkv, delta, *sizes, **constants
    )
    total = column_sums(part)[: heads * (2 * width + 6)]
    dkey, dvalue, dweight, dbias = total.split([heads * width, heads * width, heads * 5, heads])
    return dqkv, dweight.view(heads, 5), dbias, dkey.view(heads, width), dvalue.view(heads, width)


@torch.library.custom_op("affmae::cluster_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv, *of_parameters = launch_backward(
        dout.contiguous(), qkv, pos, row_entry, row_count, key_entry, key_count, weight, bias, blank_key, blank_value,
        out, lse,
    )  # fmt: skip
    dweight, dbias, dkey, dvalue = (gradient.clone() for gradient in of_parameters)  # results share no memory
    return dqkv, dweight, dbias, dkey, dvalue


@_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv, dweight, dbias, dkey, dvalue = map(torch.empty_like, (qkv, weight, bias, blank_key, blank_value))
    return dqkv, dweight, dbias, dkey, dvalue


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    dqkv, *of_parameters = _backward(dout, *ctx.saved_tensors)
    return dqkv, None, None, None, None, None, *of_parameters


attend.register_autograd(_differentiate, setup_context=_keep)


def places(neighbourhoods: Neighbourhoods) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operators take of neighbourhoods: positions, and both walks' entries and counts."""
    walks = neighbourhoods.walks
    rows, keys = walks.rows, walks.keys
    pos_BN2 = neighbourhoods.pos_BN2.contiguous()
    return pos_BN2, rows.entry_BGE, rows.count_BG, keys.entry_BGE, keys.count_BG


def cluster_attention(
    qkv_BN3AD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_AD: Tensor,
    blank_value_AD: Tensor,
    bias_weight_A5: Tensor,
    bias_A: Tensor,
) -> Tensor:
    """See the package for the formula and the shapes."""
    parameters = bias_weight_A5, bias_A, blank_key_AD, blank_value_AD
    out_BNAD, _ = attend(
        qkv_BN3AD.contiguous(), *places(neighbourhoods), *(tensor.float().contiguous() for tensor in parameters)
    )
    return out_BNAD
