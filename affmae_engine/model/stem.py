"""Patch embedding: log2(p) strided convolutions, masked after every one of them (method section 1 and 2).

Unusual: a masked patch is set to 0 in the image and again after every convolution, before LayerNorm and GELU, so that
nothing of it reaches a visible patch although the convolutions overlap. What a visible patch then sees of a masked
neighbour is known without computing it: zeros in the image, GELU(bias of the LayerNorm) later. So only the visible
patches are computed: a convolution of stride 2 and padding 1 needs of its neighbours no more than the last row of the
patch above, the last column of the patch to the left and the corner between them, the patch's rim. It becomes one
matrix product over all features of a patch and one over its rim; that most of the large matrix is zero costs less than
cutting 3x3 windows out, which would write every feature two times and more. (Up to an edge of 8; the matrix grows with
its fourth power, so larger patches are convolved, each with its rim.)

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

LARGEST_MATRIX = 8
"""Largest edge of features whose convolution is done as a dense matrix product."""
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
        window_BVwwI = _image_windows(image_BIHW, visible_BV, around, self.patch)
        x = _convolve_windows(window_BVwwI, self.convs[0])
        for norm, conv in zip(self.norms[:-1], self.convs[1:], strict=True):
            assert isinstance(norm, LayerNorm)
            feat_BVrrC = F.gelu(norm(x))
            rims = around.rims(feat_BVrrC, F.gelu(norm.bias).to(feat_BVrrC.dtype))
            x = _convolve(feat_BVrrC, rims, conv)
        feat_BVC: Tensor = self.norms[-1](x.flatten(2))
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

    def rims(self, feat_BVrrC: Tensor, masked_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each patch sees of its neighbours: corner [B, V, C], the row above it and the column left [B, V, r, C].

        Args:
            feat_BVrrC: features of the visible patches.
            masked_C: what stands in a masked patch on the canvas; outside of it there are zeros.
        """
        corner = self._neighbour("corner", feat_BVrrC[:, :, -1, -1], masked_C)
        above = self._neighbour("above", feat_BVrrC[:, :, -1], masked_C)
        return corner, above, self._neighbour("left", feat_BVrrC[:, :, :, -1], masked_C)

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


def _convolve(feat_BVrrC: Tensor, rims: tuple[Tensor, Tensor, Tensor], conv: nn.Module) -> Tensor:
    """3x3 convolution of stride 2 over patches and their rims: [B, V, r/2, r/2, C']."""
    edge = feat_BVrrC.shape[2]
    corner_BVC, above_BVrC, left_BVrC = rims
    if edge > LARGEST_MATRIX:
        first_BVw1C = torch.cat([corner_BVC[:, :, None, None], left_BVrC[:, :, :, None]], 2)
        rest_BVwrC = torch.cat([above_BVrC[:, :, None], feat_BVrrC], 2)
        return _convolve_windows(torch.cat([first_BVw1C, rest_BVwrC], 3), conv)
    matrix, bias = _as_matrix(conv, edge)
    rim_BVR = torch.cat([corner_BVC, above_BVrC.flatten(2), left_BVrC.flatten(2)], 2)
    rim_matrix = torch.cat([matrix[:, 0].flatten(1), matrix[:, 1:, 0].flatten(1)], 1)
    out = F.linear(feat_BVrrC.flatten(2), matrix[:, 1:, 1:].flatten(1), bias) + F.linear(rim_BVR, rim_matrix)
    return out.unflatten(-1, (edge // 2, edge // 2, -1))


def _convolve_windows(window_BVwwC: Tensor, conv: nn.Module) -> Tensor:
    """The same over windows of w = r + 1 that hold their rims."""
    assert isinstance(conv, nn.Conv2d)
    edge = window_BVwwC.shape[2] - 1
    if edge > LARGEST_MATRIX:
        out = F.conv2d(window_BVwwC.flatten(0, 1).permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2)
        return out.permute(0, 2, 3, 1).unflatten(0, window_BVwwC.shape[:2])
    matrix, bias = _as_matrix(conv, edge)
    values_BVK = window_BVwwC.flatten(2)
    odd = -values_BVK.shape[-1] % 8  # tensor cores take rows of whole 16 bytes
    out = F.linear(F.pad(values_BVK, (0, odd)), F.pad(matrix.flatten(1), (0, odd)), bias)
    return out.unflatten(-1, (edge // 2, edge // 2, -1))


def _as_matrix(conv: nn.Module, edge: int) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of stride 2 as a linear map of a patch with its rim: weight [(r/2)^2 C', r+1, r+1, C] and bias
    [(r/2)^2 C'], for features of edge r. Row and column 0 are the rim."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    taps_O33C = conv.weight.permute(0, 2, 3, 1)
    places = [
        F.pad(taps_O33C, (0, 0, x, edge - 2 - x, y, edge - 2 - y)) for y in range(0, edge, 2) for x in range(0, edge, 2)
    ]
    return torch.cat(places), conv.bias.repeat(len(places))
