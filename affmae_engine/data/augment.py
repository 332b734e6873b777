"""Geometry of a training crop: where it is cut, how it is resized, how it is turned.

Every draw is a pure function of a numpy Generator. Resizing is antialiased (the filter grows with the reduction), so
that a reduced crop shows averaged pixels and not a moire of picked ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


@dataclass(frozen=True)
class Crop:
    """A square window: rows y <= . < y + edge, columns x <= . < x + edge, in pixels of the stored image."""

    y: int
    x: int
    edge: int


@dataclass(frozen=True)
class Turn:
    """Quarter turns counter-clockwise, then a mirror image left to right: together the 8 symmetries of a square."""

    quarters: int = 0
    mirrored: bool = False

    def apply(self, square_YX: NDArray[np.float32]) -> NDArray[np.float32]:
        """The turned square, as a contiguous array."""
        turned = np.rot90(square_YX, self.quarters)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


def draw_crop(rng: np.random.Generator, shape_YX: tuple[int, int], size: int, scale: tuple[float, float]) -> Crop:
    """A random window of edge `size * u`, u uniform in `scale`, anywhere in a plane.

    A plane that is smaller gives the largest square that fits: the content is enlarged rather than mirrored, since a
    mirror image of a hidden patch would give its pixels away.
    """
    edge = min(max(1, round(size * rng.uniform(*scale))), *shape_YX)
    y = int(rng.integers(shape_YX[0] - edge + 1))
    x = int(rng.integers(shape_YX[1] - edge + 1))
    return Crop(y, x, edge)


def draw_turn(rng: np.random.Generator) -> Turn:
    """One of the 8 symmetries of a square, all equally likely."""
    return Turn(int(rng.integers(4)), bool(rng.integers(2)))


def resize(square_YX: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Resample a square to `size` x `size` pixels: bicubic, antialiased. Pixel areas, not pixel centres, correspond."""
    if square_YX.shape == (size, size):
        return square_YX
    plane_11YX = torch.from_numpy(np.ascontiguousarray(square_YX))[None, None]
    resized = F.interpolate(plane_11YX, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized[0, 0].numpy()
