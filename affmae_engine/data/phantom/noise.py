"""Smooth random fields in physical space, and grain for single sections.

Unusual: a field is a lattice of random numbers read through cubic B-splines, so it has a value at every point of
space in nm, is the same whatever the pixel size, and costs four multiply-adds per axis on a pixel grid (the grid is
separable). The summation order is fixed, hence the same bits on every run.

Axes: C channel, Z Y X space, N points, T the four taps of a cubic B-spline.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

F32 = NDArray[np.float32]
# Mean of the summed squares of the four B-spline weights, per axis (151/315); makes a field's variance one.
_SPLINE_ENERGY = 151 / 315


class SplineNoise:
    """Unit-variance Gaussian random field whose features are about `2 * step_nm` wide.

    `low_nm` and `high_nm` (z, y, x) bound the region that may be asked for; points outside are clamped to its edge.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        low_nm: NDArray[np.float64],
        high_nm: NDArray[np.float64],
        step_nm: float,
        channels: int = 1,
    ) -> None:
        self.step_nm = step_nm
        self._low_nm = np.asarray(low_nm, dtype=np.float64)
        size = np.ceil((np.asarray(high_nm) - self._low_nm) / step_nm).astype(int) + 4
        lattice_CZYX = rng.standard_normal((channels, *size), dtype=np.float32)
        self._lattice_CZYX = lattice_CZYX * np.float32(_SPLINE_ENERGY**-1.5)

    def _taps(self, position_nm: NDArray[np.float64], axis: int) -> tuple[NDArray[np.intp], F32]:
        """Lattice index of the first tap and the four weights (T, N), for positions along one axis."""
        size = self._lattice_CZYX.shape[axis + 1]
        lattice = np.clip((position_nm - self._low_nm[axis]) / self.step_nm, 0, size - 3 - 1e-6)
        first = np.floor(lattice).astype(np.intp)
        first = np.minimum(first, size - 4)
        t = lattice - first
        weight_TN = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        return first, weight_TN.astype(np.float32)

    def grid(self, z_nm: float, y_nm: NDArray[np.float64], x_nm: NDArray[np.float64]) -> F32:
        """Values (C, Y, X) float32 on one plane of an axis-aligned grid; y_nm (Y,) and x_nm (X,) in nm."""
        first_z, weight_z = self._taps(np.array([z_nm]), 0)
        first_y, weight_y = self._taps(y_nm, 1)
        first_x, weight_x = self._taps(x_nm, 2)
        plane_CYX = sum(weight_z[t, 0] * self._lattice_CZYX[:, first_z[0] + t] for t in range(4))
        row_CYX = sum(weight_x[t] * plane_CYX[:, :, first_x + t] for t in range(4))
        out = sum(weight_y[t][:, None] * row_CYX[:, first_y + t] for t in range(4))
        return np.asarray(out, dtype=np.float32)

    def at(self, point_N3: NDArray[np.float64]) -> F32:
        """Values (C, N) float32 at points (N, 3) in nm, z y x."""
        taps = [self._taps(point_N3[:, axis], axis) for axis in range(3)]
        out = np.zeros((self._lattice_CZYX.shape[0], len(point_N3)), dtype=np.float32)
        for tz in range(4):
            for ty in range(4):
                for tx in range(4):
                    weight_N = taps[0][1][tz] * taps[1][1][ty] * taps[2][1][tx]
                    out += weight_N * self._lattice_CZYX[:, taps[0][0] + tz, taps[1][0] + ty, taps[2][0] + tx]
        return out


def grain(rng: np.random.Generator, shape_YX: tuple[int, int], pixel_nm: tuple[float, float], scale_nm: float) -> F32:
    """Unit-variance Gaussian noise (Y, X) with features of `scale_nm`; white where that is below a pixel."""
    white = rng.standard_normal(shape_YX, dtype=np.float32)
    sigma = (scale_nm / pixel_nm[0], scale_nm / pixel_nm[1])
    if max(sigma) < 0.35:
        return white
    smooth = ndimage.gaussian_filter(white, sigma, mode="reflect", truncate=3.0)
    # Analytic gain of a Gaussian filter on white noise, at least one pixel wide: keeps tiny images unit-variance too.
    gain = np.sqrt(max(2 * np.sqrt(np.pi) * sigma[0], 1.0) * max(2 * np.sqrt(np.pi) * sigma[1], 1.0))
    return np.asarray(smooth * np.float32(gain), dtype=np.float32)
