"""Token merging on tensor cores: forward, its gradients, and both as operators of PyTorch.

    z[k, c, :] = sum_i g_c(k, i) s_i F[i, :],   g = GELU(LayerNorm(linear(dx, dy, d, dy/d, dx/d))),   c = 1..4

16 survivors walk the union of their clusters (see neighbourhoods/walks.py) in tiles of 32 tokens. The four weights of a
pair are computed on the fly, in registers, and multiplied by score and membership, so that the sum over tokens is four
dense products. For the gradients of features and scores 16 tokens walk the transposed list: every program owns what it
writes, nothing is atomic, and the result has the same bits in every run.

    U[i, :] = sum_k,c g_c(k, i) dz[k, c, :],   dF_i = s_i U_i,   ds_i = F_i . U_i,   dg_c(k, i) = s_i F_i . dz[k, c, :]

Axes: B batch, N tokens, K survivors, G groups of R = 16 rows, J = 32 columns of a tile, C channels, CB of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.walks import build_walks
from affmae_kernels.token_merging.triton_backward import merge_tokens_backward
from affmae_kernels.token_merging.triton_pairs import SIZES, constants_of, normalised, read_columns, weight_of


@triton.jit(do_not_specialize=SIZES)
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
        col, bits = read_columns(entry, e0, count, N, TILE)
        at = (b * N + col)[:, None] * C + channel[None, :]
        feat = tl.load(FEAT + at, mask=(channel < C)[None, :], other=0.0)  # [J, CB]
        dx = tl.load(pos + col * 2).to(tl.float32)[None, :] - x_R[:, None]
        dy = tl.load(pos + col * 2 + 1).to(tl.float32)[None, :] - y_R[:, None]
        score = tl.load(SCORE + b * N + col)
        share = tl.where((bits[None, :] & bit[:, None]) != 0, score[None, :], 0.0)  # [R, J]
        h0, h1, h2, h3, _ = normalised(PARAMETERS, dx, dy)
        z0 = tl.dot((weight_of(PARAMETERS, 0, h0) * share).to(feat.dtype), feat, z0, input_precision=PREC)
        z1 = tl.dot((weight_of(PARAMETERS, 1, h1) * share).to(feat.dtype), feat, z1, input_precision=PREC)
        z2 = tl.dot((weight_of(PARAMETERS, 2, h2) * share).to(feat.dtype), feat, z2, input_precision=PREC)
        z3 = tl.dot((weight_of(PARAMETERS, 3, h3) * share).to(feat.dtype), feat, z3, input_precision=PREC)
    out = OUT + (b * K + row)[:, None] * 4 * C + channel[None, :]
    real = (row < K)[:, None] & (channel < C)[None, :]
    tl.store(out, z0.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + C, z1.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 2 * C, z2.to(OUT.dtype.element_ty), mask=real)
    tl.store(out + 3 * C, z3.to(OUT.dtype.element_ty), mask=real)


@torch.library.custom_op("affmae::merge_tokens", mutates_args=())
def _forward(
    feat: Tensor, score: Tensor, parameters: Tensor, pos: Tensor, survivors: Tensor,
    row_entry: Tensor, row_count: Tensor, key_entry: Tensor, key_count: Tensor,
) -> Tensor:  # fmt: skip
    batch, tokens, channels = feat.shape
    count, groups = survivors.shape[1], row_count.shape[1]
    out = torch.empty(batch, count, 4 * channels, dtype=feat.dtype, device=feat.device)
    constants = constants_of(feat.dtype)
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


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return (*merge_tokens_backward(dz, *ctx.saved_tensors), None, None, None, None, None, None)


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
