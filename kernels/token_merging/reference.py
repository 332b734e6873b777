"""Token merging in plain PyTorch: scores, survivors, and what a survivor gathers.

`merge_tokens` is z = W F with the weights W scattered into a dense matrix over all tokens. Memory: W is [B, K, 4, N] in fp32, 16 * B * K * N bytes, kept for the backward pass (base, 512 px, half masked, first
stage: 27 MB an image); above 1 GiB in tiles of survivors that are recomputed in the backward pass.

Axes: B batch, N tokens, K survivors (k in a tile), C channels, M neighbours, P slots (N padded to whole clusters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.neighbourhoods.reference import cluster_members, neighbour_geometry
from affmae_kernels.precision import compute_dtype, in_tiles


def token_scores(feat_BNC: Tensor, weight_1C: Tensor, bias_1: Tensor) -> Tensor:
    """See the package for the formula and the shapes."""
    return F.linear(feat_BNC.to(weight_1C.dtype), weight_1C, bias_1).squeeze(-1).sigmoid()


def select_survivors(value_BN: Tensor, near: Neighbourhoods, count: int) -> Tensor:
    """See the package."""
    value_BN = value_BN.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # Rows by canvas index, then those rows by value: the second sort is stable
    canvas_BN = torch.argsort(near.pos_BN2[..., 1] * near.canvas_hw[1] + near.pos_BN2[..., 0], dim=1)
    rank_BN = torch.argsort(torch.gather(value_BN, 1, canvas_BN), dim=1, descending=True, stable=True)
    return torch.gather(canvas_BN, 1, rank_BN[:, :count]).sort(dim=1).values


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
    dtype = compute_dtype(feat_BNC)
    batch, tokens, _ = feat_BNC.shape
    slots = neighbourhoods.count * neighbourhoods.cluster_size
    scored_BNC = feat_BNC.to(dtype) * score_BN.to(dtype)[..., None]
    scored_BPC = F.pad(scored_BNC, (0, 0, 0, slots - tokens))
    pos_BP2 = F.pad(neighbourhoods.pos_BN2, (0, 0, 0, slots - tokens))
    weight_45, bias_4, norm_weight_4, norm_bias_4 = (
        x.to(dtype) for x in (weight_45, bias_4, norm_weight_4, norm_bias_4)
    )

    def gather(rows: slice) -> Tensor:
        survivors_Bk = survivors_BK[:, rows]
        nearest_BkC = _take(neighbourhoods.nearest_BNC, survivors_Bk)
        index_BkM = cluster_members(nearest_BkC, neighbourhoods.cluster_size)
        geometry_BkM5 = neighbour_geometry(pos_BP2, _take(pos_BP2, survivors_Bk), index_BkM, dtype)
        raw_BkM4 = F.linear(geometry_BkM5, weight_45, bias_4)
        # Empty slots of a short cluster need no mask: their features are the zeros of the padding.
        g_Bk4M = F.gelu(F.layer_norm(raw_BkM4, (4,), norm_weight_4, norm_bias_4, eps=1e-5)).mT
        empty_Bk4P = g_Bk4M.new_zeros(batch, g_Bk4M.shape[1], 4, slots)
        weight_Bk4P = empty_Bk4P.scatter(-1, index_BkM[:, :, None].expand(-1, -1, 4, -1), g_Bk4M)
        return (weight_Bk4P.flatten(1, 2) @ scored_BPC).view(batch, g_Bk4M.shape[1], -1)

    z_BK4C = in_tiles(survivors_BK.shape[1], batch * 4 * slots, gather, dim=1)
    return z_BK4C.to(feat_BNC.dtype)


def _take(rows_BNE: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image by index, [B, K, E]."""
    return torch.gather(rows_BNE, 1, index_BK[..., None].expand(-1, -1, rows_BNE.shape[-1]))
