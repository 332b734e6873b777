"""Patch embedding: log2(patch) strided convolutions that see nothing of masked patches (method sections 1 and 2).

Axes: B batch, I image channels, H W image, V visible patches, C channels.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from affmae_kernels.stem import stem


class Stem(nn.Module):
    """Convolutions 3x3, stride 2, padding 1, of widths dim/2, ..., dim/2, dim, each with a LayerNorm; GELU between."""

    def __init__(self, channels: int, dim: int, patch: int, backend: str = "auto") -> None:
        super().__init__()
        widths = [channels] + [dim // 2] * (patch.bit_length() - 2) + [dim]
        self.patch, self.backend = patch, backend
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        for weight, bias in _weights_and_biases(self.convs):
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            nn.init.zeros_(bias)

    def forward(self, image_BIHW: Tensor, visible_BV: Tensor | None) -> Tensor:
        """Embeds the visible patches.

        Args:
            image_BIHW: floating; `patch` divides both sides.
            visible_BV: int64 canvas indices; None: every cell, in canvas order.

        Returns:
            feat_BVC, in the order of `visible_BV`.
        """
        convs, norms = _weights_and_biases(self.convs), _weights_and_biases(self.norms)
        return stem(image_BIHW, visible_BV, convs, norms, self.patch, backend=self.backend)


def _weights_and_biases(layers: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    return [(layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in layers]
