"""Pictures as coloured half blocks: two pixels a character, one above the other. Pure, Pillow and numpy only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UPPER_HALF = "▀"
Rgb = NDArray[np.uint8]
Run = tuple[int, tuple[int, int, int], tuple[int, int, int]]


def fitting_size(picture: Rgb, columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows that a picture takes within columns x rows characters, keeping its shape (a pixel is square)."""
    height, width = picture.shape[:2]
    scale = min(columns / width, 2 * rows / height)
    return max(1, min(columns, round(width * scale))), max(1, min(rows, -(-round(height * scale) // 2)))


def half_blocks(picture: Rgb, columns: int, rows: int) -> list[list[Run]]:
    """A picture [height, width, 3] resampled to exactly columns x rows characters.

    Returns:
        For each row runs of (length, colour of the upper pixel, colour of the lower pixel).
    """
    kind = Image.Resampling.BOX if picture.shape[1] > columns else Image.Resampling.NEAREST
    small = np.asarray(Image.fromarray(picture).resize((columns, 2 * rows), kind))
    return [_runs(small[2 * row], small[2 * row + 1]) for row in range(rows)]


def _runs(upper: Rgb, lower: Rgb) -> list[Run]:
    both = np.concatenate([upper, lower], axis=-1)
    breaks = np.flatnonzero((both[1:] != both[:-1]).any(axis=-1)) + 1
    edges = [0, *breaks.tolist(), len(both)]
    found: list[Run] = []
    for a, b in pairwise(edges):
        r1, g1, b1, r2, g2, b2 = both[a].tolist()
        found.append((b - a, (r1, g1, b1), (r2, g2, b2)))
    return found
