"""Cluster attention in plain PyTorch: the full matrix of products, of which the listed pairs are picked.

Dense products with a gather and a scatter of 64 numbers per row are many times faster in plain PyTorch than gathering
64 keys and values per token, and so are their gradients; the result is the same sum over the neighbourhood.

Memory: two [B, H, N, N] matrices in fp32 while a tile of queries is worked on, one of them kept for the backward
pass: 4 * B * H * N^2 bytes per block (base, 512 px, half masked, first stage: 67 MB an image). Above 1 GiB the queries
are worked through in tiles that are recomputed in the backward pass and nothing of this size is kept.

Axes: B batch, N tokens (n in a tile), H heads, D head width, M = C * m neighbours, P = K * m slots (N padded to whole
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
    qkv_BN3HD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(qkv_BN3HD)
    batch, tokens, _, heads, width = qkv_BN3HD.shape
    slots = neighbourhoods.count * neighbourhoods.cluster_size
    query_BHND, key_BHND, value_BHND = qkv_BN3HD.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    query_BHND = query_BHND * width**-0.5
    key_BHPD, value_BHPD = (F.pad(x, (0, 0, 0, slots - tokens)) for x in (key_BHND, value_BHND))
    blank_key_HD, blank_value_HD = blank_key_HD.to(dtype), blank_value_HD.to(dtype)
    bias_weight_H5, bias_H11 = bias_weight_H5.to(dtype), bias_H.to(dtype)[:, None, None]
    index_BNM, valid_BNM = neighbourhoods.members_BNM()
    pos_BP2 = F.pad(neighbourhoods.pos_BN2, (0, 0, 0, slots - tokens))

    def attend(rows: slice) -> Tensor:
        index_BnM, valid_BnM = index_BNM[:, rows], valid_BNM[:, rows]
        index_BHnM = index_BnM[:, None].expand(-1, heads, -1, -1)
        query_BHnD = query_BHND[:, :, rows]
        geometry_BnM5 = neighbour_geometry(pos_BP2, neighbourhoods.pos_BN2[:, rows], index_BnM, dtype)
        bias_BHnM = torch.einsum("bnmf,hf->bhnm", geometry_BnM5, bias_weight_H5) + bias_H11
        logit_BHnM = (query_BHnD @ key_BHPD.mT).gather(-1, index_BHnM) + bias_BHnM
        logit_BHnM = logit_BHnM.masked_fill(~valid_BnM[:, None], float("-inf"))
        blank_BHn1 = query_BHnD @ blank_key_HD[..., None]
        share_BHnM, share_BHn1 = torch.cat([logit_BHnM, blank_BHn1], -1).softmax(-1).split([index_BnM.shape[-1], 1], -1)
        empty_BHnP = share_BHnM.new_zeros(batch, heads, query_BHnD.shape[2], slots)
        share_BHnP = empty_BHnP.scatter(-1, index_BHnM, share_BHnM)
        return share_BHnP @ value_BHPD + share_BHn1 * blank_value_HD[:, None]

    out_BHND = in_tiles(tokens, batch * heads * slots, attend, dim=2)
    return out_BHND.transpose(1, 2).to(qkv_BN3HD.dtype)
