"""Arrays in memory or behind dask and zarr as a `Source`, so that they are read and predicted as files are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers import PixelSize, Source, SourceInfo
from affmae_engine.data.readers.grey import grey_rule
from affmae_engine.data.readers.source import Refused
from affmae_engine.errors import InputError


class ArraySource(Source):
    """A gray array [Y, X] or [Z, Y, X] with slicing (numpy, dask, zarr, h5py, ...); only what is asked for is read.

    Args:
        array: of real numbers; values become gray as those of files do (signed ones are shifted, see
            `data.readers.grey`).
        pixel_nm: edge of a voxel in nanometers along z, y, x.

    Raises:
        InputError: other axes, no pixels, or no real numbers.
    """

    def __init__(self, array: Any, pixel_nm: PixelSize = (None, None, None)) -> None:
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape is None or dtype is None:
            array = np.asarray(array)
            shape, dtype = array.shape, array.dtype
        if len(shape) not in (2, 3):
            raise InputError(
                f"an array of {len(shape)} axes was given", "pass a gray section [Y, X] or stack [Z, Y, X]"
            )
        if 0 in shape:
            raise InputError(f"an array of shape {tuple(shape)} has no pixels", "pass a section or stack with pixels")
        try:
            self._rule, notes = grey_rule(np.dtype(dtype))
        except Refused as error:
            raise InputError(f"the array cannot be used: {error.message}", error.hint) from error
        self._array, self._flat = array, len(shape) == 2
        depth, height, width = (1, *shape) if self._flat else shape
        info = SourceInfo(
            path=Path("array"),
            series="",
            name="array",
            shape_ZYX=(int(depth), int(height), int(width)),
            dtype=self._rule.dtype,
            pixel_nm=pixel_nm,
            format="array",
            notes=notes,
            value_offset=self._rule.offset,
        )
        super().__init__(info)

    def _open(self) -> Any:
        return self._array

    def _close(self, handle: Any) -> None:
        pass  # whoever made the array closes it

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        block = handle[slice(*y), slice(*x)] if self._flat else handle[slice(*z), slice(*y), slice(*x)]
        raw = np.asarray(block)
        return self._rule(raw[None] if self._flat else raw)


def voxel_size(pixel_size: float | Sequence[float | None] | None) -> PixelSize:
    """Nanometers along (z, y, x) from one number (y and x), (y, x) or (z, y, x).

    Raises:
        InputError: other than one to three positive numbers.
    """
    if pixel_size is None:
        return (None, None, None)
    try:
        given = list(pixel_size) if isinstance(pixel_size, Iterable) else [pixel_size]
        values = [None if value is None else float(value) for value in given]
    except (TypeError, ValueError):
        values = []
    if not 1 <= len(values) <= 3 or not all(value is None or 0 < value < 1e9 for value in values):
        raise InputError(f"{pixel_size!r} is no pixel size", "give (z, y, x) in nanometers, such as (30, 5, 5)")
    return (values[0] if len(values) == 3 else None, values[-2] if len(values) > 1 else values[0], values[-1])
