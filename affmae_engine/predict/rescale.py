"""Resampling between two pixel sizes, one axis at a time, for any window of the result.

The filter is the antialiased bilinear one (a triangle as wide as the larger of the two pixels). Every output pixel is a
sum over a few input pixels, so a window of the output needs only the input under it, and has the values that it would
have if the whole plane were resampled at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AxisResampling:
    """Resampling of one axis from `old` to `new` pixels over the same extent."""

    old: int
    new: int

    @cached_property
    def taps(self) -> tuple[np.ndarray, np.ndarray]:
        """Input pixels of every output pixel, int64 [new, taps], and their weights, float32; the weights sum to 1."""
        ratio = self.old / self.new
        reach = max(1.0, ratio)
        center = (np.arange(self.new) + 0.5) * ratio - 0.5
        place = np.floor(center - reach).astype(np.int64)[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
        weight = np.maximum(0, 1 - np.abs(place - center[:, None]) / reach)
        weight[(place < 0) | (place >= self.old)] = 0
        weight /= weight.sum(1, keepdims=True)
        return place, weight.astype(np.float32)

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """First and one-past-last old pixel under the new pixels first..last-1."""
        place, weight = (values[first:last] for values in self.taps)
        used = place[weight > 0]
        return int(used.min()), int(used.max()) + 1

    def apply(self, values: Tensor, dim: int, held: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
        """The new pixels `wanted` along `dim`.

        Args:
            values: float32; along `dim` the old pixels `held` (first, one past last), which include all that is needed.
            dim: the axis.
            held, wanted: ranges of pixels.
        """
        place, weight = (part[wanted[0] : wanted[1]] for part in self.taps)
        shape = [1] * values.ndim
        shape[dim] = -1
        total: Tensor | None = None
        for k in range(place.shape[1]):
            index = torch.from_numpy(np.clip(place[:, k] - held[0], 0, held[1] - held[0] - 1)).to(values.device)
            factor = torch.from_numpy(weight[:, k].copy()).to(values.device).view(shape)
            part = values.index_select(dim, index)
            total = part.mul_(factor) if total is None else total.addcmul_(part, factor)
        assert total is not None
        return total


def resampled_shape(
    shape: tuple[int, int], old_nm: tuple[float, float], new_nm: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of a plane after resampling from one pixel size to another, at least one pixel."""
    height, width = (max(1, round(n * old / new)) for n, old, new in zip(shape, old_nm, new_nm, strict=True))
    return height, width
