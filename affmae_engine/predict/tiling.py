"""Where tiles lie on an axis and how they are blended, one axis at a time.

The grid is regular and starts half a tile outside the image: every pixel, also one at the border, is covered by the
same pattern of tiles, and what lies outside is the image reflected. (Tiles clamped to the image weigh unequally near
its border, which shows as a frame.) The weights are normalised per axis when the plan is made: the grid is a product
of two axes, so the sum of the 2-D weights over all tiles is 1 at every pixel and nothing is divided afterwards.

Axes: T tile, N tiles along the axis.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

WINDOW_SIGMA = 1 / 8
"""Standard deviation of the blending window, as a fraction of the tile's edge."""


def gaussian_window(tile: int) -> Tensor:
    """The blending window of one axis: a Gaussian centred in the tile, 1 at most; float64 [T]."""
    offset = torch.arange(tile, dtype=torch.float64) - (tile - 1) / 2
    return torch.exp(-0.5 * (offset / (tile * WINDOW_SIGMA)) ** 2)


def tile_stride(tile: int, overlap: float) -> int:
    """Pixels between two neighbouring tiles, at least 1 and at most `tile`."""
    return min(tile, max(1, round(tile * (1 - overlap))))


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixel of every tile along an axis of `length` pixels, ascending.

    The first tile starts at -(tile // 2), and they go on until one reaches half a tile beyond the end, so that every
    pixel is covered as in the middle; a tile that would lie outside altogether is left out. Starts are negative, and
    tiles end beyond the image, by design.

    Raises:
        ValueError: length or tile is not positive, or overlap is not in [0, 1).
    """
    if length < 1 or tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"length {length} and tile {tile} must be positive, overlap {overlap} in [0, 1)")
    margin, stride = tile // 2, tile_stride(tile, overlap)
    count = 1 + max(0, -(-(length - tile + 2 * margin) // stride))
    starts = (-margin + stride * i for i in range(count))
    return [start for start in starts if start < length]


def reflect(index: np.ndarray, length: int) -> np.ndarray:
    """Map positions outside [0, length) into it by reflection about the first and last pixel (not repeated), however
    far outside they lie; a single pixel is repeated."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    folded = np.mod(index, period)
    return np.minimum(folded, period - folded)


@dataclass(frozen=True)
class Axis:
    """All tiles along one axis of an image.

    Args:
        length: pixels of the image along this axis.
        tile: edge of a tile, in pixels.
        overlap: share of a tile that its neighbour covers too.
    """

    length: int
    tile: int
    overlap: float

    @cached_property
    def starts(self) -> list[int]:
        """First pixel of every tile (see `tile_starts`)."""
        return tile_starts(self.length, self.tile, self.overlap)

    @cached_property
    def weights(self) -> Tensor:
        """Blending weights, float32 [N, T]: over all tiles they sum to 1 at every pixel; 0 outside the image."""
        window = gaussian_window(self.tile)
        lowest, highest = self.starts[0], self.starts[-1] + self.tile
        total = torch.zeros(highest - lowest, dtype=torch.float64)
        for start in self.starts:
            total[start - lowest : start - lowest + self.tile] += window
        rows = []
        for start in self.starts:
            weight = window / total[start - lowest : start - lowest + self.tile]
            position = torch.arange(start, start + self.tile)
            rows.append(weight * ((position >= 0) & (position < self.length)))
        return torch.stack(rows).float()

    def covering(self, first: int, last: int) -> range:
        """Numbers of the tiles that reach into the pixels first..last-1."""
        low = bisect.bisect_right(self.starts, first - self.tile)
        return range(low, bisect.bisect_left(self.starts, last))
