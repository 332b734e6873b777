"""A volume cut into blocks, and the windows around them.

Axes: Z Y X.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, int, int]
Window = tuple[slice, slice, slice]
ReadWindow = Callable[[slice, slice, slice], np.ndarray]
"""Reads the voxels [z, y, x] of plain slices inside a volume; `Source.read` is one."""


@dataclass(frozen=True)
class Block:
    """Voxels start <= position < stop along z, y, x; `index` is its place in the list, `cell` its place in the grid."""

    index: int
    cell: Shape
    start: Shape
    stop: Shape

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""
        return self.stop[0] - self.start[0], self.stop[1] - self.start[1], self.stop[2] - self.start[2]

    @property
    def window(self) -> Window:
        """The block as slices of the volume."""
        return _window(self.start, self.stop)

    def with_halo(self, halo: Shape, volume: Shape) -> tuple[Window, Window]:
        """(slices of the volume: the block and its halo as far as the volume goes; slices of the block in these)."""
        low = [max(0, a - h) for a, h in zip(self.start, halo, strict=True)]
        high = [min(n, b + h) for b, h, n in zip(self.stop, halo, volume, strict=True)]
        inner = [a - c for a, c in zip(self.start, low, strict=True)]
        return _window(low, high), _window(inner, [i + n for i, n in zip(inner, self.shape, strict=True)])


def grid_shape(volume: Shape, size: Shape) -> Shape:
    """Number of blocks along z, y, x."""
    z, y, x = (-(-n // s) for n, s in zip(volume, size, strict=True))
    return z, y, x


def blocks(volume: Shape, size: Shape) -> list[Block]:
    """All blocks in raster order; those at the far ends may be smaller."""
    return [block_at(volume, size, cell) for cell in itertools.product(*(range(n) for n in grid_shape(volume, size)))]


def block_at(volume: Shape, size: Shape, cell: Sequence[int]) -> Block:
    """The block at a place z, y, x of the grid."""
    _, rows, columns = grid_shape(volume, size)
    cz, cy, cx = cell
    start = cz * size[0], cy * size[1], cx * size[2]
    z, y, x = (min(a + s, n) for a, s, n in zip(start, size, volume, strict=True))
    return Block((cz * rows + cy) * columns + cx, (cz, cy, cx), start, (z, y, x))


def row_blocks(volume: Shape, voxels: int) -> list[Block]:
    """Blocks of whole rows of about `voxels` voxels, at least 8 sections thick where rows allow it.

    Image files hold rows, so that reading part of a row costs as much as reading all of it.
    """
    depth, height, width = volume
    thick = min(depth, max(8, voxels // (height * width)))
    rows = min(height, max(16, voxels // (thick * width)))
    return blocks(volume, (thick, rows, width))


def read_padded(read: ReadWindow, block: Block, margin: int, volume: Shape) -> np.ndarray:
    """A block with `margin` voxels on every side; what lies outside the volume is 0."""
    (z, y, x), inner = block.with_halo((margin, margin, margin), volume)
    values = read(z, y, x)
    before = [margin - s.start for s in inner]
    after = [margin - (v - s.stop) for v, s in zip(values.shape, inner, strict=True)]
    return np.pad(values, list(zip(before, after, strict=True)))


def _window(start: Sequence[int], stop: Sequence[int]) -> Window:
    z, y, x = (slice(a, b) for a, b in zip(start, stop, strict=True))
    return z, y, x
