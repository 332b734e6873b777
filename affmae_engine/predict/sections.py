"""The sections of a source as planes for tiled inference: standardised rows, read a bounded amount ahead.

Small sections are read several at a time (a Zarr chunk holds many of them and would be decoded once for each), large
ones by rows. Nothing of a section is kept once the next one is asked for.

Axes: Z Y X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from affmae_engine.data.readers import Source
from affmae_engine.predict.infer import ArrayPlane, Plane

SLAB_PIXELS = 1 << 25
"""Pixels of small sections that are read at once, in the source's dtype."""

AHEAD_PIXELS = 1 << 24
"""Pixels of a large section that are read at once, besides those a tile row needs; float32 when kept."""

Standardise = Callable[[np.ndarray], np.ndarray]


def sections(source: Source, standardise: Standardise, first: int = 0) -> Iterator[Plane]:
    """Every section of `source` in order, from number `first` on.

    Args:
        standardise: source values of any dtype to float32, pixel by pixel.
    """
    depth, height, width = source.info.shape_ZYX
    together = min(depth, SLAB_PIXELS // (height * width))
    for z0 in range(first, depth, max(1, together)):
        if together <= 1:
            yield SectionRows(source, z0, standardise)
            continue
        slab_ZYX = source.read(slice(z0, z0 + together), slice(0, height), slice(0, width))
        for section_YX in slab_ZYX:
            yield ArrayPlane(standardise(section_YX))


class SectionRows:
    """One large section whose rows are read as they are needed, a block of rows at a time."""

    def __init__(self, source: Source, z: int, standardise: Standardise) -> None:
        _, height, width = source.info.shape_ZYX
        self.shape = height, width
        self._source, self._z, self._standardise = source, z, standardise
        self._first = self._last = 0
        self._held = np.empty((0, width), np.float32)

    def rows(self, first: int, last: int, /) -> np.ndarray:
        """Standardised rows first..last-1; rows above the last request are read again if they are asked for."""
        if first < self._first or last > self._last:
            self._load(first, last)
        return self._held[first - self._first : last - self._first]

    def _load(self, first: int, last: int) -> None:
        height, width = self.shape
        stop = min(height, max(last, first + max(1, AHEAD_PIXELS // width)))
        start = self._last if self._first <= first <= self._last else first
        block = self._source.read(slice(self._z, self._z + 1), slice(start, stop), slice(0, width))[0]
        kept = self._held[first - self._first :] if start != first else self._held[:0]
        self._held = np.concatenate([kept, self._standardise(block)])
        self._first, self._last = first, stop
