"""Patch embedding: log2(p) strided convolutions, masked after every one of them (method section 1 and 2).

Unusual: a masked patch is set to 0 in the image and again after every convolution, before LayerNorm and GELU, so that
nothing of it reaches a visible patch although the convolutions overlap.

Axes: B batch, C channels, H W image, h w canvas, V visible tokens, I image channels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from affmae_engine.model.patches import take_rows


class Stem(nn.Module):
    """Convolutions 3x3, stride 2, padding 1, of widths dim/2, ..., dim/2, dim; LayerNorm and GELU between them."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        count = int(math.log2(patch))
        widths = [channels] + [dim // 2] * (count - 1) + [dim]
        self.patch = patch
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for width in widths[1:])
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, image_BIHW: Tensor, visible_BV: Tensor | None) -> Tensor:
        """Embeds the visible patches.

        Args:
            image_BIHW: floating; `patch` divides both sides.
            visible_BV: int64 canvas indices; None: every cell, in canvas order.

        Returns:
            feat_BVC, in the order of `visible_BV`.
        """
        hidden_B1hw = None if visible_BV is None else self._hidden(image_BIHW, visible_BV)
        x = _blank(image_BIHW, hidden_B1hw)
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            x = _blank(conv(x), hidden_B1hw)
            x = nn.functional.gelu(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        feat_BTC = self.convs[-1](x).flatten(2).transpose(1, 2)
        if visible_BV is not None:
            feat_BTC = take_rows(feat_BTC, visible_BV)
        feat_BVC: Tensor = self.norms[-1](feat_BTC)
        return feat_BVC

    def _hidden(self, image_BIHW: Tensor, visible_BV: Tensor) -> Tensor:
        """[B, 1, h, w] bool: the masked cells."""
        batch, _, height, width = image_BIHW.shape
        canvas = height // self.patch, width // self.patch
        hidden_BT = torch.ones(batch, canvas[0] * canvas[1], dtype=torch.bool, device=image_BIHW.device)
        return hidden_BT.scatter(1, visible_BV, False).view(batch, 1, *canvas)


def _blank(x_BCHW: Tensor, hidden_B1hw: Tensor | None) -> Tensor:
    """Sets the masked cells to 0 (also where they are NaN), at whatever resolution `x` has."""
    if hidden_B1hw is None:
        return x_BCHW
    factor = x_BCHW.shape[-2] // hidden_B1hw.shape[-2]
    mask_B1HW = hidden_B1hw.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return x_BCHW.masked_fill(mask_B1HW, 0.0)
