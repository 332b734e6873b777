"""Heads of the decoder: from query features to the pixels, or class logits, of a patch (method sections 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from affmae_engine.model.initialise import linear
from affmae_engine.model.norm import LayerNorm

STEP_OF_HEAD = {"last": -1, "step2": 1, "step1": 0}
"""Decoder step whose output each head reads. The auxiliary heads sit on the sparse stages, which collapse without."""


class Head(nn.Module):
    """LayerNorm and a linear layer to the values of a patch, laid out as (row, column, channel or class)."""

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.linear = linear(dim, values)

    def forward(self, feat_BQC: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, values], at least fp32."""
        value_BQP: Tensor = self.linear(self.norm(feat_BQC))
        return value_BQP.to(torch.promote_types(value_BQP.dtype, torch.float32))


def make_heads(dim: int, values: int) -> nn.ModuleDict:
    """One head per supervised step, by the names of `STEP_OF_HEAD`."""
    return nn.ModuleDict({name: Head(dim, values) for name in STEP_OF_HEAD})


def class_head_from_pixel_head(
    weight: Tensor, bias: Tensor, classes: int, channels: int, patch: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The class head's start: the pixel head (mean over image channels) repeated per class, plus noise of 1e-4.

    Args:
        weight: [p * p * channels, C] of the pixel head.
        bias: [p * p * channels].
        classes: number of classes.
        channels: image channels of the pixel head.
        patch: p.
        generator: of the noise, on the CPU.

    Returns:
        weight [p * p * classes, C] and bias [p * p * classes], rows laid out as (row, column, class).

    Raises:
        ValueError: when the pixel head has another number of rows.
    """
    if weight.shape[0] != patch * patch * channels or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a pixel head for {channels} channels and patches of {patch} has {patch * patch * channels} rows; got "
            f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        )

    def repeated(rows: Tensor) -> Tensor:
        per_pixel = rows.unflatten(0, (patch * patch, channels)).mean(1)
        result = per_pixel.repeat_interleave(classes, 0)
        noise = torch.randn(result.shape, generator=generator, dtype=torch.float32)
        return result + 1e-4 * noise.to(result)

    return repeated(weight), repeated(bias)
