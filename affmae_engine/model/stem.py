"""Patch embedding: log2(p) strided convolutions, masked after every one of them (method section 1 and 2).

Unusual: a masked patch is set to 0 in the image and again after every convolution, before LayerNorm and GELU, so that
nothing of it reaches a visible patch although the convolutions overlap. What a visible patch then sees of a masked
neighbour is known without computing it: zeros in the image, GELU(bias of the LayerNorm) later. So only the visible
patches are computed: a convolution of stride 2 and padding 1 needs of its neighbours no more than the last row of the
patch above and the last column of the patch to the left, and becomes one matrix product over 3x3 windows.

Axes: B batch, C channels, H W image, h w canvas, V visible tokens, I image channels, r edge of a patch's features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affmae_engine.model.norm import LayerNorm

_DIRECTIONS = {"left": (-1, 0), "above": (0, -1), "corner": (-1, -1)}
"""(x, y) steps to the patches that a window reaches into."""


class Stem(nn.Module):
    """Convolutions 3x3, stride 2, padding 1, of widths dim/2, ..., dim/2, dim; LayerNorm and GELU between them."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        count = int(math.log2(patch))
        widths = [channels] + [dim // 2] * (count - 1) + [dim]
        self.patch = patch
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths[1:])
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
        if visible_BV is None:
            return self._all(image_BIHW)
        canvas_hw = image_BIHW.shape[-2] // self.patch, image_BIHW.shape[-1] // self.patch
        around = _Surroundings.of(visible_BV, canvas_hw)
        window = _image_windows(image_BIHW, visible_BV, around, self.patch)
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            assert isinstance(norm, LayerNorm)
            feat_BVrrC = F.gelu(norm(_convolve(window, conv)))
            window = around.windows(feat_BVrrC, F.gelu(norm.bias).to(feat_BVrrC.dtype))
        feat_BVC: Tensor = self.norms[-1](_convolve(window, self.convs[-1]).flatten(2))
        return feat_BVC

    def _all(self, image_BIHW: Tensor) -> Tensor:
        x = image_BIHW
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            x = F.gelu(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        feat_BTC: Tensor = self.norms[-1](self.convs[-1](x).flatten(2).transpose(1, 2))
        return feat_BTC


@dataclass(frozen=True)
class _Surroundings:
    """Where the neighbours of each visible patch are found.

    before, after: per direction int64 [B, V], the row of the neighbour there and of the one opposite; V where that is
    masked or outside. inside: per direction bool [B, V], whether the neighbour is on the canvas.
    """

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    inside: dict[str, Tensor]

    @classmethod
    def of(cls, visible_BV: Tensor, canvas_hw: tuple[int, int]) -> _Surroundings:
        height, width = canvas_hw
        batch, count = visible_BV.shape
        x_BV, y_BV = visible_BV % width + 1, visible_BV // width + 1
        row_BE = visible_BV.new_full((batch, (height + 2) * (width + 2)), count)  # with a rim of one cell
        cell_BV = y_BV * (width + 2) + x_BV
        row_BE.scatter_(1, cell_BV, torch.arange(count, device=visible_BV.device).expand(batch, -1))
        before, after, inside = {}, {}, {}
        for name, (dx, dy) in _DIRECTIONS.items():
            step = dy * (width + 2) + dx
            before[name] = row_BE.gather(1, cell_BV + step)
            after[name] = row_BE.gather(1, cell_BV - step)
            inside[name] = (x_BV + dx > 0) & (y_BV + dy > 0)
        return cls(before, after, inside)

    def windows(self, feat_BVrrC: Tensor, masked_C: Tensor) -> Tensor:
        """[B, V, r+1, r+1, C]: each patch with the last row and column of those above and to the left of it.

        Args:
            feat_BVrrC: features of the visible patches.
            masked_C: what stands in a masked patch on the canvas; outside of it there are zeros.
        """
        left = self._neighbour("left", feat_BVrrC[:, :, :, -1], masked_C)[:, :, :, None]
        above = self._neighbour("above", feat_BVrrC[:, :, -1], masked_C)[:, :, None]
        corner = self._neighbour("corner", feat_BVrrC[:, :, -1, -1], masked_C)[:, :, None, None]
        return torch.cat([torch.cat([corner, above], 3), torch.cat([left, feat_BVrrC], 3)], 2)

    def _neighbour(self, name: str, edge: Tensor, masked_C: Tensor) -> Tensor:
        """The edges [B, V, ..., C] of each patch's neighbour in a direction."""
        shape = (*edge.shape[:2], *[1] * (edge.ndim - 2))
        there = (self.before[name] < edge.shape[1]).view(shape)
        filling = masked_C * self.inside[name].view(shape)
        return torch.where(there, _Shift.apply(edge, self.before[name], self.after[name]), filling)


class _Shift(torch.autograd.Function):
    """out[b, v] = edge[b, before[b, v]]. Every row is asked for at most once, so the gradient is a look-up as well:
    no scattered sums, no dependence on their order. Where the index is V the result is not defined, the gradient 0."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, before_BV: Tensor, after_BV: Tensor) -> Tensor:
        ctx.save_for_backward(after_BV)
        return _look_up(edge, before_BV)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (after_BV,) = ctx.saved_tensors
        there = (after_BV < grad.shape[1]).view(*after_BV.shape, *[1] * (grad.ndim - 2))
        return torch.where(there, _look_up(grad, after_BV), 0.0), None, None


def _look_up(rows: Tensor, index_BV: Tensor) -> Tensor:
    image_B1 = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return rows[image_B1, index_BV.clamp(max=rows.shape[1] - 1)]


def _image_windows(image_BIHW: Tensor, visible_BV: Tensor, around: _Surroundings, patch: int) -> Tensor:
    """[B, V, p+1, p+1, I]: the pixels that the first convolution sees of each visible patch, 0 where masked."""
    width = image_BIHW.shape[-1] // patch
    padded_BIHW = F.pad(image_BIHW, (1, 0, 1, 0))
    every_BhwppI = padded_BIHW.unfold(2, patch + 1, patch).unfold(3, patch + 1, patch).permute(0, 2, 3, 4, 5, 1)
    image_B1 = torch.arange(len(image_BIHW), device=image_BIHW.device)[:, None]
    window = every_BhwppI[image_B1, visible_BV // width, visible_BV % width]
    seen = {name: (rows < visible_BV.shape[1])[:, :, None, None, None] for name, rows in around.before.items()}
    rim = torch.arange(patch + 1, device=image_BIHW.device) == 0
    row, column = rim[:, None, None], rim[None, :, None]
    hidden = (row & column & ~seen["corner"]) | (row & ~column & ~seen["above"]) | (~row & column & ~seen["left"])
    return window.masked_fill(hidden, 0.0)


def _convolve(window: Tensor, conv: nn.Module) -> Tensor:
    """3x3 convolution of stride 2 over windows [B, V, r+1, r+1, C]: [B, V, r/2, r/2, C'], one matrix product."""
    assert isinstance(conv, nn.Conv2d)
    half = window.shape[2] // 2
    taps = [window[:, :, y : y + 2 * half - 1 : 2, x : x + 2 * half - 1 : 2] for y in range(3) for x in range(3)]
    return F.linear(torch.cat(taps, -1), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
