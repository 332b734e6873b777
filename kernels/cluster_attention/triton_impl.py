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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.cluster_attention.triton_backward import launch_backward
from affmae_kernels.cluster_attention.triton_pairs import SIZES, geometry, launch, load_bias, read_columns
from affmae_kernels.neighbourhoods import Neighbourhoods


@triton.jit(do_not_specialize=SIZES)
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
    w0, w1, w2, w3, w4, c = load_bias(WEIGHT, BIAS, heads, 1 / scale)
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
        col, bits = read_columns(entry, e0, count, N, TILE)
        at = col[None, :, None] * stride + hd
        k = tl.load(q_ptr + A * D + at)  # [HB, J, D]
        v = tl.load(q_ptr + 2 * A * D + at)
        x_J = tl.load(pos + col * 2).to(tl.float32)
        y_J = tl.load(pos + col * 2 + 1).to(tl.float32)
        o, dx, dy, dist, ry, rx = geometry(x_R, y_R, x_J, y_J, (bits[None, :] & bit[:, None]) != 0, 1)
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


@torch.library.custom_op("affmae::cluster_attention", mutates_args=())
def attend(
    qkv: Tensor, pos: Tensor, row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
    weight: Tensor, bias: Tensor, blank_key: Tensor, blank_value: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    grid, sizes, constants = launch(qkv, row_entry, row_count, "forward")
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
