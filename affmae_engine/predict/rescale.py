"""Resampling of planes between two pixel sizes, band by band, with the result of resampling the whole plane.

The filter is the antialiased bilinear one (a triangle as wide as the larger of the two pixels). It is separable, so
each axis is a sparse matrix with a few entries per output pixel, and a band of output rows needs only the input rows
under its own entries: nothing depends on where bands begin.

Axes: C classes, R rows of a band, Y X plane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_matrix

from affmae_engine.predict.infer import Band, Plane

ROWS_AT_ONCE = 64
"""Rows that leave at once when probabilities are mapped back, which bounds memory however fine the input is."""


@dataclass(frozen=True)
class AxisResampling:
    """Resampling of one axis from `old` to `new` pixels over the same extent."""

    old: int
    new: int

    @cached_property
    def matrix(self) -> csr_matrix:
        """float32 [new, old]; every row sums to 1."""
        ratio = self.old / self.new
        reach = max(1.0, ratio)
        centre = (np.arange(self.new) + 0.5) * ratio - 0.5
        taps = np.floor(centre - reach).astype(np.int64)[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
        weight = np.maximum(0, 1 - np.abs(taps - centre[:, None]) / reach)
        weight[(taps < 0) | (taps >= self.old)] = 0
        weight /= weight.sum(1, keepdims=True)
        row, column = np.nonzero(weight)
        entries = weight[row, column].astype(np.float32)
        return csr_matrix((entries, (row, taps[row, column])), shape=(self.new, self.old))

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """First and one-past-last old pixel under the new pixels first..last-1."""
        columns = self.matrix.indices[self.matrix.indptr[first] : self.matrix.indptr[last]]
        return int(columns.min()), int(columns.max()) + 1


def resampled_shape(
    shape: tuple[int, int], old_nm: tuple[float, float], new_nm: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of a plane after resampling from one pixel size to another, at least one pixel."""
    height, width = (max(1, round(n * old / new)) for n, old, new in zip(shape, old_nm, new_nm, strict=True))
    return height, width


class ResampledPlane:
    """A plane seen at another pixel size; rows are resampled when they are asked for."""

    def __init__(self, plane: Plane, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._plane = plane
        self._y = AxisResampling(plane.shape[0], shape[0])
        self._x = AxisResampling(plane.shape[1], shape[1])

    def rows(self, first: int, last: int, /) -> np.ndarray:
        """Resampled rows first..last-1 as float32."""
        low, high = self._y.needed(first, last)
        rows = self._y.matrix[first:last, low:high] @ self._plane.rows(low, high)
        return np.ascontiguousarray((self._x.matrix @ rows.T).T)


def map_back(bands: Iterable[Band], inner: tuple[int, int], outer: tuple[int, int]) -> Iterator[Band]:
    """Probabilities at the network's pixel size, resampled to the input's own grid.

    Args:
        bands: complete planes in order, each of shape `inner`.
        outer: shape of the planes that come out.

    Yields:
        bands of at most `ROWS_AT_ONCE` rows, on the CPU; they still sum to 1 over the classes.
    """
    y, x = AxisResampling(inner[0], outer[0]), AxisResampling(inner[1], outer[1])
    held: np.ndarray | None = None
    plane, held_from, done = -1, 0, 0
    for band in bands:
        values_CRX = band.probabilities_CRX.cpu().numpy()
        if band.plane != plane:
            plane, held_from, done, held = band.plane, 0, 0, None
        held = values_CRX if held is None else np.concatenate([held, values_CRX], axis=1)
        available = held_from + held.shape[1]
        while done < outer[0]:
            last = min(outer[0], done + ROWS_AT_ONCE)
            low, high = y.needed(done, last)
            if high > available:
                break
            rows_matrix = y.matrix[done:last, low:high]
            part = [x.matrix @ (rows_matrix @ held_YX[low - held_from : high - held_from]).T for held_YX in held]
            yield Band(plane, done, torch.from_numpy(np.stack(part).transpose(0, 2, 1)))
            done = last
        if done < outer[0]:
            keep = y.needed(done, min(outer[0], done + 1))[0]
            held, held_from = held[:, keep - held_from :], keep
