"""LayerNorm with fp32 statistics whose result has the dtype that the next layer computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, eps 1e-5. Under autocast PyTorch returns fp32, which every matrix product would copy to half
    precision again and every residual after it would carry on; here the rounding happens once, at the end."""

    EPS = 1e-5

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], of autocast's dtype where that is on, else of `x`'s."""
        normed = super().forward(x)
        kind = x.device.type
        return normed.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else normed
