"""Geometry of a pretraining crop: where it is cut, and how it is turned. Pure functions of a numpy Generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Crop:
    """A square window: rows y <= . < y + edge, columns x <= . < x + edge, in pixels of the stored image."""

    y: int
    x: int
    edge: int


def draw_crop(rng: np.random.Generator, shape_YX: tuple[int, int], size: int, scale: tuple[float, float]) -> Crop:
    """A random window of edge `size * u`, u uniform in `scale`, anywhere in a plane.

    A plane that is smaller gives the largest square that fits: the content is enlarged rather than mirrored, since a
    mirror image of a hidden patch would give its pixels away.
    """
    edge = min(max(1, round(size * rng.uniform(*scale))), *shape_YX)
    y = int(rng.integers(shape_YX[0] - edge + 1))
    x = int(rng.integers(shape_YX[1] - edge + 1))
    return Crop(y, x, edge)


def draw_turn(rng: np.random.Generator) -> int:
    """One of the 8 symmetries of a square, all equally likely: quarter turns, plus 4 for a mirror image."""
    return int(rng.integers(4)) + 4 * int(rng.integers(2))
