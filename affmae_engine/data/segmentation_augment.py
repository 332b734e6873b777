"""Augmentation of an image and its labels in step: one warp (affine and elastic together) and intensity changes.

What is unusual. A warp is drawn as the source coordinates of every output pixel, so image and labels are each
interpolated once, whatever was combined, and only the window that these coordinates touch has to be read. Outside the
image the coordinates are folded back (the image is mirrored); labels there become `IGNORE`, since mirrored anatomy is
context, not truth. The elastic part is a cubic B-spline over a coarse lattice of random displacements: no larger
than asked for, smooth, and without folds, as the lattice spacing is at least four times the displacement (2-D
uniform cubic B-splines are one-to-one below 0.48 spacings, Choi and Lee 2000).

Everything is a pure function of a numpy Generator. Axes: YX image, 2 = (y, x) coordinates in source pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from affmae_engine.config import FinetuneConfig

_SMALLEST_SPACING = 32
"""Smallest distance of two control points of the elastic lattice, in pixels."""


def draw_warp(
    rng: np.random.Generator, size: int, config: FinetuneConfig, *, flips: bool, margin: float = 0.0
) -> NDArray[np.float32]:
    """Source coordinates [2, size, size] of the pixels of a square, relative to the centre of the square.

    Args:
        size: edge of the output, in pixels.
        config: `rotation`, `scale` (shear goes up to half of it) and `elastic`.
        flips: mirror and turn by quarters as well.
        margin: largest shift of the centre along each axis, in pixels.
    """
    angle = math.radians(rng.uniform(-config.rotation, config.rotation))
    if flips:
        angle += math.pi / 2 * rng.integers(4)
    magnification = np.exp(rng.uniform(math.log(1 - config.scale), math.log(1 + config.scale)))
    shear = rng.uniform(-config.scale / 2, config.scale / 2)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]]) / magnification
    if flips and rng.integers(2):
        matrix[:, 1] *= -1
    shift = rng.uniform(-margin, margin, size=2)
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    y, x = axis[:, None], axis[None, :]
    warp = np.empty((2, size, size), dtype=np.float32)
    for row in range(2):
        warp[row] = np.float32(matrix[row, 0]) * y + np.float32(matrix[row, 1]) * x + np.float32(shift[row])
    if config.elastic > 0:
        warp += _displacement(rng, size, config.elastic)
    return warp


def fold(coordinate: NDArray[np.float32], length: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mirror coordinates into [0, length - 1] about the outermost pixels, and say which ones lay outside the image."""
    outside = (coordinate < -0.5) | (coordinate > length - 0.5)
    if length == 1:
        return np.zeros_like(coordinate), outside
    last = np.float32(length - 1)
    return np.abs(np.mod(coordinate + last, 2 * last) - last), outside


def sample_image(image_YX: NDArray[np.float32], coordinate_2HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear values at coordinates inside the image."""
    return map_coordinates(image_YX, coordinate_2HW, order=1, mode="nearest", output=np.float32)


def sample_labels(labels_YX: NDArray, coordinate_2HW: NDArray[np.float32]) -> NDArray:
    """Nearest values at coordinates inside the image."""
    y, x = np.rint(coordinate_2HW).astype(np.intp)
    return labels_YX[y, x]


def change_intensities(rng: np.random.Generator, image_YX: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    """Random gamma, contrast, brightness and noise of a normalised image (zero mean, unit deviation).

    Args:
        strength: largest relative change of contrast, and of brightness in standard deviations; gamma goes from
            1/(1 + strength) to 1 + strength over the range of the image, noise up to strength/2 deviations.
    """
    if strength == 0:
        return image_YX
    gamma = math.exp(rng.uniform(-1, 1) * math.log1p(strength))
    contrast = math.exp(rng.uniform(-1, 1) * math.log1p(strength))
    brightness = rng.uniform(-strength, strength)
    noise = rng.uniform(0, strength / 2)
    low, high = float(image_YX.min()), float(image_YX.max())
    span = max(high - low, 1e-6)
    bent = ((image_YX - low) / span) ** gamma * span + low
    grain = rng.standard_normal(image_YX.shape, dtype=np.float32)
    return (contrast * bent + brightness + noise * grain).astype(np.float32)


def _displacement(rng: np.random.Generator, size: int, largest: float) -> NDArray[np.float32]:
    spacing = max(_SMALLEST_SPACING, math.ceil(4 * largest))
    basis = _spline_basis(size, spacing)
    points = basis.shape[1]
    amplitude = rng.uniform(0, largest) / math.sqrt(2)  # each axis; so that the vector is no longer than `largest`
    lattice = rng.uniform(-amplitude, amplitude, size=(2, points, points)).astype(np.float32)
    return (basis @ lattice @ basis.T).astype(np.float32, copy=False)


@lru_cache(maxsize=8)
def _spline_basis(size: int, spacing: int) -> NDArray[np.float32]:
    """Uniform cubic B-spline weights [size, control points]; every row sums to 1."""
    position = np.arange(size) / spacing
    cell = np.floor(position).astype(int)
    t = position - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = np.zeros((size, cell[-1] + 4), dtype=np.float32)
    for k in range(4):
        basis[np.arange(size), cell + k] = weights[:, k]
    return basis
