"""Patch embedding in plain PyTorch: convolutions of the whole canvas, masked after every one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.precision import compute_dtype

EPS = 1e-5
"""Of the LayerNorms."""


def stem(
    image_BIHW: Tensor,
    visible_BV: Tensor | None,
    convs: Sequence[tuple[Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]],
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the package for the formula and the shapes; features are computed in `dtype`."""
    # Cells that are masked, [B, 1, h, w].
    batch, _, height, width = image_BIHW.shape
    masked_B1hw = None
    if visible_BV is not None:
        masked_BT = torch.ones(batch, height // patch * (width // patch), dtype=torch.bool, device=image_BIHW.device)
        masked_B1hw = masked_BT.scatter(1, visible_BV, 0).view(batch, 1, height // patch, width // patch)

    x_BCHW = _blank(image_BIHW.to(dtype), masked_B1hw)
    for layer, ((weight, bias), norm) in enumerate(zip(convs, norms, strict=True)):
        z_BCHW = F.conv2d(x_BCHW, weight.to(dtype), bias.to(dtype), stride=2, padding=1)
        x_BHWC = _layer_norm(_blank(z_BCHW, masked_B1hw).permute(0, 2, 3, 1), *norm)
        if layer < len(convs) - 1:
            x_BHWC = F.gelu(x_BHWC)
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)

    # The last features are one per cell.
    feat_BTC = x_BHWC.flatten(1, 2)
    if visible_BV is None:
        return feat_BTC
    return torch.gather(feat_BTC, 1, visible_BV[..., None].expand(-1, -1, feat_BTC.shape[-1]))


def _blank(x_BCHW: Tensor, masked_B1hw: Tensor | None) -> Tensor:
    """Sets the masked cells to 0, whatever stood there."""
    if masked_B1hw is None:
        return x_BCHW
    edge = x_BCHW.shape[-1] // masked_B1hw.shape[-1]
    return x_BCHW.masked_fill(masked_B1hw.repeat_interleave(edge, 2).repeat_interleave(edge, 3), 0.0)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis with statistics in fp32 (float64 for float64), in the dtype of `x`."""
    dtype = compute_dtype(x)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), EPS).to(x.dtype)
