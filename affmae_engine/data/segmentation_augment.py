"""Augmentation of images and their labels in step: one warp (affine and elastic together) and intensity changes.

What is unusual. A warp gives the source coordinates of every output pixel, so image and labels are each interpolated
once, whatever was combined, and only the window that these coordinates touch has to be read. Outside the image the
coordinates are folded back (the image is mirrored); labels there become `IGNORE`, since mirrored anatomy is context,
not truth. The elastic part is a cubic B-spline over a coarse lattice of random displacements: no larger than asked for,
smooth, and without folds, as the lattice spacing is at least four times the displacement (2-D uniform cubic B-splines
are one-to-one below 0.48 spacings, Choi and Lee 2000).

What is drawn is a pure function of a numpy Generator; what is computed runs for a whole batch on any device.
Axes: B samples, 2 = (y, x) coordinates in source pixels, Y X window, H W output pixels, P control points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affmae_engine.config import FinetuneConfig

_SMALLEST_SPACING = 32
"""Smallest distance of two control points of the elastic lattice, in pixels."""


@dataclass(frozen=True)
class Warp:
    """Where the pixels of a square come from, relative to its center: matrix @ (y, x) + spline displacement."""

    matrix_22: NDArray[np.float32]
    lattice_2PP: NDArray[np.float32]
    """Displacements of the control points; without points if there is no elastic part."""

    def reach(self, size: int) -> tuple[float, float]:
        """The largest distances from the center, along y and x, in a square of edge `size`."""
        elastic = np.abs(self.lattice_2PP).max(initial=0.0, axis=(1, 2))
        y, x = (size - 1) / 2 * np.abs(self.matrix_22).sum(1) + elastic
        return float(y), float(x)


def draw_warp(rng: np.random.Generator, size: int, config: FinetuneConfig, *, flips: bool) -> Warp:
    """A random warp.

    Args:
        size: edge of the output, in pixels.
        config: `rotation`, `scale` (shear goes up to half of it) and `elastic`.
        flips: mirror and turn by quarters as well.
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
    lattice = np.zeros((2, 0, 0), np.float32)
    if config.elastic > 0:
        points = _spline_basis(size, config.elastic).shape[1]
        amplitude = rng.uniform(0, config.elastic) / math.sqrt(2)  # each axis; together no longer than `elastic`
        lattice = rng.uniform(-amplitude, amplitude, size=(2, points, points)).astype(np.float32)
    return Warp(matrix.astype(np.float32), lattice)


def largest_reach(size: int, config: FinetuneConfig) -> float:
    """A bound of `Warp.reach` over all warps that can be drawn."""
    angle = math.radians(min(config.rotation, 45.0))
    row = (math.cos(angle) + math.sin(angle) + config.scale / 2) / (1 - config.scale)
    return (size - 1) / 2 * row + config.elastic / math.sqrt(2)


def source_coordinates(matrix_B22: Tensor, lattice_B2PP: Tensor, size: int, largest: float) -> Tensor:
    """Source coordinates [B, 2, size, size] of the pixels of squares, relative to their centers.

    Args:
        matrix_B22, lattice_B2PP: of `Warp`s.
        size: edge of the squares.
        largest: the displacement that the lattices were drawn for (`FinetuneConfig.elastic`).
    """
    axis = torch.arange(size, dtype=torch.float32, device=matrix_B22.device) - (size - 1) / 2
    of_y, of_x = matrix_B22[:, :, 0, None, None], matrix_B22[:, :, 1, None, None]  # [B, 2, 1, 1]
    place_B2HW = of_y * axis[:, None] + of_x * axis
    if lattice_B2PP.shape[-1]:
        basis_HP = _spline_basis(size, largest).to(axis.device)
        place_B2HW = place_B2HW + basis_HP @ lattice_B2PP @ basis_HP.T
    return place_B2HW


def window_of(center: float, reach: float, length: int) -> slice:
    """The pixels along an axis that folded coordinates within `reach` of `center` touch, with their neighbors."""
    low, high, last = center - reach, center + reach, length - 1
    if low < 0 or high > last:
        low, high = min(low, 2 * last - high), max(high, -low)
    return slice(max(0, math.floor(low) - 1), min(length, math.ceil(high) + 2))


def draw_intensities(rng: np.random.Generator, strength: float) -> NDArray[np.float32]:
    """Random (gamma, contrast, brightness, noise) for `change_intensities`.

    Args:
        strength: largest relative change of contrast, and of brightness in standard deviations; gamma goes from
            1/(1 + strength) to 1 + strength over the range of the image, noise up to strength/2 deviations.
    """
    gamma = math.exp(rng.uniform(-1, 1) * math.log1p(strength))
    contrast = math.exp(rng.uniform(-1, 1) * math.log1p(strength))
    return np.array([gamma, contrast, rng.uniform(-strength, strength), rng.uniform(0, strength / 2)], np.float32)


def change_intensities(image_BHW: Tensor, change_B4: Tensor, seed_B: Tensor) -> Tensor:
    """Gamma, contrast, brightness and noise of normalized images (zero mean, unit deviation).

    Args:
        image_BHW: float32.
        change_B4: float32, of `draw_intensities`.
        seed_B: int32, of the noise.
    """
    gamma, contrast, brightness, noise = (change_B4[:, i, None, None] for i in range(4))
    low, high = image_BHW.amin((1, 2), keepdim=True), image_BHW.amax((1, 2), keepdim=True)
    span = (high - low).clamp(min=1e-6)
    bent = ((image_BHW - low) / span) ** gamma * span + low
    return contrast * bent + brightness + noise * gaussian_noise(seed_B, image_BHW.shape[1:])


def gaussian_noise(seed_B: Tensor, shape_HW: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, H, W], a pure function of the seeds on every device.

    A 32-bit hash of seed and pixel (Wellons' lowbias32) gives two 16-bit uniform numbers, and those one normal one
    (Box and Muller 1958), of magnitude 4.9 at most.
    """
    pixel = torch.arange(math.prod(shape_HW), dtype=torch.int32, device=seed_B.device).view(1, *shape_HW)
    bits = _hash(pixel ^ _hash(seed_B[:, None, None]))
    first, second = ((half + 0.5) / 65536 for half in ((bits >> 16) & 0xFFFF, bits & 0xFFFF))
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def _hash(bits: Tensor) -> Tensor:
    """A permutation of the int32 numbers that scatters neighbors; products wrap around."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * 0x7FEB352D
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * (0x846CA68B - (1 << 32))
    return bits ^ ((bits >> 16) & 0xFFFF)


@lru_cache(maxsize=8)
def _spline_basis(size: int, largest: float) -> Tensor:
    """Uniform cubic B-spline weights [size, control points]; every row sums to 1."""
    position = np.arange(size) / max(_SMALLEST_SPACING, math.ceil(4 * largest))
    cell = np.floor(position).astype(int)
    t = position - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = np.zeros((size, cell[-1] + 4), dtype=np.float32)
    for k in range(4):
        basis[np.arange(size), cell + k] = weights[:, k]
    return torch.from_numpy(basis)
