"""Cluster attention in plain PyTorch: the full matrix of products, of which the listed pairs are picked.

Dense products with a gather and a scatter of 64 numbers per row are many times faster in plain PyTorch than gathering
64 keys and values per token, and so are their gradients; the result is the same sum over the neighbourhood.

Memory: two [B, A, N, N] matrices in fp32 while a tile of queries is worked on, one of them kept for the backward
pass: 4 * B * A * N^2 bytes per block (base, 512 px, half masked, first stage: 67 MB an image). Above 1 GiB the queries
are worked through in tiles that are recomputed in the backward pass and nothing of this size is kept.

Axes: B batch, N tokens (n in a tile), A heads, D head width, M = C * m neighbours, P = K * m slots (N padded to whole
clusters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.reference import neighbour_geometry
from affmae_kernels.precision import compute_dtype, in_tiles


def cluster_attention(
    qkv_BN3AD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_AD: Tensor,
    blank_value_AD: Tensor,
    bias_weight_A5: Tensor,
    bias_A: Tensor,
) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(qkv_BN3AD)
    batch, tokens, _, heads, width = qkv_BN3AD.shape
    slots = neighbourhoods.count * neighbourhoods.cluster_size
    query_BAND, key_BAND, value_BAND = qkv_BN3AD.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    query_BAND = query_BAND * width**-0.5
    key_BAPD, value_BAPD = (F.pad(x, (0, 0, 0, slots - tokens)) for x in (key_BAND, value_BAND))
    blank_key_AD, blank_value_AD = blank_key_AD.to(dtype), blank_value_AD.to(dtype)
    bias_weight_A5, bias_A11 = bias_weight_A5.to(dtype), bias_A.to(dtype)[:, None, None]
    index_BNM, valid_BNM = neighbourhoods.members_BNM()
    pos_BP2 = F.pad(neighbourhoods.pos_BN2, (0, 0, 0, slots - tokens))

    def attend(rows: slice) -> Tensor:
        index_BnM, valid_BnM = index_BNM[:, rows], valid_BNM[:, rows]
        index_BAnM = index_BnM[:, None].expand(-1, heads, -1, -1)
        query_BAnD = query_BAND[:, :, rows]
        geometry_BnM5 = neighbour_geometry(pos_BP2, neighbourhoods.pos_BN2[:, rows], index_BnM, dtype)
        bias_BAnM = torch.einsum("bnmf,af->banm", geometry_BnM5, bias_weight_A5) + bias_A11
        logit_BAnM = (query_BAnD @ key_BAPD.mT).gather(-1, index_BAnM) + bias_BAnM
        logit_BAnM = logit_BAnM.masked_fill(~valid_BnM[:, None], float("-inf"))
        blank_BAn1 = query_BAnD @ blank_key_AD[..., None]
        share_BAnM, share_BAn1 = torch.cat([logit_BAnM, blank_BAn1], -1).softmax(-1).split([index_BnM.shape[-1], 1], -1)
        empty_BAnP = share_BAnM.new_zeros(batch, heads, query_BAnD.shape[2], slots)
        share_BAnP = empty_BAnP.scatter(-1, index_BAnM, share_BAnM)
        return share_BAnP @ value_BAPD + share_BAn1 * blank_value_AD[:, None]

    out_BAND = in_tiles(tokens, batch * heads * slots, attend, dim=2)
    return out_BAND.transpose(1, 2).to(qkv_BN3AD.dtype)
