"""Gradients of cluster attention on tensor cores; the axes and what is saved are those of `triton_impl`.

Two kernels: one owns groups of queries and also sums the parameters' gradients, the other owns groups of keys and walks
the transposed lists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.cluster_attention.triton_pairs import SIZES, geometry, launch, load_bias, read_columns
from affmae_kernels.column_sums import column_sums


@triton.jit(do_not_specialize=SIZES)
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
    w0, w1, w2, w3, w4, c = load_bias(WEIGHT, BIAS, heads, 1 / scale)
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
        col, bits = read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + hd
        k = tl.load(q_ptr + A * D + at)
        v = tl.load(q_ptr + 2 * A * D + at)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        o, dx, dy, dist, ry, rx = geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, 1)
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


@triton.jit(do_not_specialize=SIZES)
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
    w0, w1, w2, w3, w4, _c = load_bias(WEIGHT, BIAS, heads, 1 / scale)
    bit = tl.full([R], 1, tl.int32) << (8 * (i // 8))  # the byte of this key's cluster; the query's bit is shifted down
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros([HB, R, D], tl.float32)
    dv = tl.zeros([HB, R, D], tl.float32)
    count = tl.load(COUNT + b * GROUPS + g)
    entry = ENTRY + (b * GROUPS + g) * ENTRIES
    stat = (b * A + heads[:, None]) * N
    for e0 in tl.range(0, count, TILE, num_stages=STAGES):
        col, bits = read_columns(entry, e0, count, N, TILE)
        bits = bits >> (tl.arange(0, TILE * 8) % 8)
        q = tl.load(q_ptr + col[None, :, None] * stride + hd)
        do = tl.load(do_ptr + col[None, :, None] * (A * D) + hd)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        lse = tl.load(LSE + stat + col[None, :])
        delta = tl.load(DELTA + stat + col[None, :])
        o, dx, dy, dist, ry, rx = geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, -1)
        start = w4 * rx + (w3 * ry + (w2 * dist + (w1 * dy + (w0 * dx + o))))
        s = tl.dot(k, tl.permute(q, (0, 2, 1)), start, input_precision=PREC)  # [HB, R keys, J queries]
        p = tl.exp2(s * scale2 - lse[:, None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.permute(do, (0, 2, 1)), input_precision=PREC) - delta[:, None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC)
    at = DQKV + b * N * stride + h0 * D + A * D + row[None, :, None] * stride + hd
    tl.store(at, (dk * scale).to(DQKV.dtype.element_ty), mask=live[None, :, None])
    tl.store(at + A * D, dv.to(DQKV.dtype.element_ty), mask=live[None, :, None])


def launch_backward(
    dout: Tensor, qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, weight, bias, blank_key and blank_value; the last four share memory."""
    heads, width = qkv.shape[3:]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    line = 16 * triton.cdiv(heads * (2 * width + 6), 16)  # wide loads when its rows are summed
    part = torch.empty(row_count.numel(), line, dtype=torch.float32, device=qkv.device)
    grid, sizes, constants = launch(qkv, row_entry, row_count, "query")
    _attention_query_kernel[grid](
        qkv, pos, row_entry, row_count, weight, bias, blank_key, blank_value, out, lse, dout, dqkv, delta, part, *sizes,
        line, **constants,
    )  # fmt: skip
    grid, sizes, constants = launch(qkv, key_entry, key_count, "key")
    _attention_key_kernel[grid](
        qkv, pos, key_entry, key_count, weight, bias, lse, dout, dqkv, delta, *sizes, **constants
    )
    total = column_sums(part)[: heads * (2 * width + 6)]
    dkey, dvalue, dweight, dbias = total.split([heads * width, heads * width, heads * 5, heads])
    return dqkv, dweight.view(heads, 5), dbias, dkey.view(heads, width), dvalue.view(heads, width)
