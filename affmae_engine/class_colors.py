"""The color of every class, the same in pictures, legends and charts. It imports no more than numpy.

Colors are told apart by color-blind readers: Okabe and Ito 2008, then Tol's muted scheme. Gray is reserved for images.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

_OKABE_ITO = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")
_TOL_MUTED = ("332288", "88CCEE", "44AA99", "117733", "999933", "DDCC77", "CC6677", "882255", "AA4499")
PALETTE: tuple[tuple[int, int, int], ...] = tuple(
    (int(h[:2], 16), int(h[2:4], 16), int(h[4:], 16)) for h in (*_OKABE_ITO, *_TOL_MUTED)
)
"""Distinct colors for classes 1, 2, 3, ..."""


def class_colour(index: int) -> tuple[int, int, int]:
    """Color of class `index`: mid gray for 0, then `PALETTE`, then further hues for more classes than it has."""
    if index == 0:
        return (128, 128, 128)
    if index <= len(PALETTE):
        return PALETTE[index - 1]
    hue = (index * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.9 if index % 2 else 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colors [count, 3] of the classes 0 to count - 1."""
    return np.array([class_colour(index) for index in range(count)], np.uint8).reshape(count, 3)
