"""Representation collapse, made visible: the effective rank of a stage's features (method section 5)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def effective_rank(feat_BNC: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of the centred features of each image.

    Between 1 (all tokens on one line, or all equal) and min(N - 1, C); nan where a feature is not finite, as after an
    overflow in fp16: that must cost the figure, not the training. Source: Roy and Vetterli, "The effective rank",
    EUSIPCO 2007.

    Args:
        feat_BNC: features of any floating dtype.

    Returns:
        rank_B, fp32 (float64 for float64 features).
    """
    with torch.autocast(feat_BNC.device.type, enabled=False):
        feat_BNC = feat_BNC.to(torch.promote_types(feat_BNC.dtype, torch.float32))
        centred_BNC = feat_BNC - feat_BNC.mean(1, keepdim=True)
        finite_B = centred_BNC.isfinite().all(-1).all(-1)
        # Where one image is not finite, the decomposition would fail for all of them.
        singular_BR = torch.linalg.svdvals(torch.where(finite_B[:, None, None], centred_BNC, 0.0))
        share_BR = singular_BR / singular_BR.sum(-1, keepdim=True).clamp(min=torch.finfo(singular_BR.dtype).tiny)
        rank_B = (-torch.xlogy(share_BR, share_BR).sum(-1)).exp()
        return rank_B.masked_fill(~finite_B, torch.nan)
