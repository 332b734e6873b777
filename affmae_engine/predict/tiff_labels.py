"""Labels as TIFF, written from the blocks while these are computed.

Two dialects. Below 4 GB of labels: an ImageJ hyperstack in compressed strips, which plain ImageJ, Fiji, napari and
every TIFF library open with voxel size, display range and a color per class in place. From 4 GB on: BigTIFF with OME
metadata in compressed tiles, for Bio-Formats (Fiji), napari and QuPath. ImageJ's own decoder refuses tiles, BigTIFF and
zstd, hence strips and deflate for as long as classic TIFF lasts.

Axes: Z Y X volume, R rows of a band.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tifffile

from affmae_engine.data.readers import PixelSize
from affmae_engine.visualize import class_colours

IMAGEJ_LIMIT = (1 << 32) - (1 << 25)
"""Largest volume in bytes for the ImageJ dialect: classic TIFF's 4 GiB less room for the page directories."""

IMAGEJ_PLANE_LIMIT = (1 << 31) - 1
"""Java arrays, and with them ImageJ's planes, end here."""

STRIP_BYTES = 1 << 18
TILE = 512
LEVEL = 6
_COLOR_MAP = 320
"""The TIFF tag."""
_AHEAD = 16
"""Pieces that are compressed in advance, for each thread."""

T = TypeVar("T")


@dataclass(frozen=True)
class OutputInfo:
    """A label volume about to be written. record: what made it, plain JSON values."""

    name: str
    shape_ZYX: tuple[int, int, int]
    dtype: np.dtype[Any]
    pixel_nm: PixelSize
    class_names: tuple[str, ...]
    record: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all labels, uncompressed."""
        z, y, x = self.shape_ZYX
        return z * y * x * self.dtype.itemsize


def fits_imagej(info: OutputInfo) -> bool:
    """Whether plain ImageJ can open these labels as one stack."""
    _, height, width = info.shape_ZYX
    return info.nbytes <= IMAGEJ_LIMIT and height * width <= IMAGEJ_PLANE_LIMIT and info.dtype.itemsize <= 2


def rows_per_band(info: OutputInfo) -> int:
    """Rows of the bands that `write_tiff` is given: whole strips or tiles; the last band of a section has the rest."""
    if not fits_imagej(info):
        return TILE
    strip = _strip_rows(info)
    return strip * max(1, TILE // strip)


def write_tiff(path: Path, info: OutputInfo, bands: Iterable[np.ndarray]) -> str:
    """Write all bands to `path`, which the caller makes appear atomically.

    A volume of one section becomes a 2-D image.

    Args:
        bands: labels [R, X] from top to bottom, section after section, of `rows_per_band` rows.

    Returns:
        the dialect in words.
    """
    shape = info.shape_ZYX if info.shape_ZYX[0] > 1 else info.shape_ZYX[1:]
    common: dict[str, Any] = {
        "dtype": info.dtype,
        "photometric": "minisblack",
        "compression": "zlib",
        "software": "affmae",
    }
    if fits_imagej(info):
        # The explicit sample axis keeps tifffile from taking images one pixel wide for a line of samples.
        common |= {"shape": (*shape, 1), "rowsperstrip": _strip_rows(info)}
        with tifffile.TiffWriter(path, imagej=True, byteorder="<") as tiff:
            tiff.write(_strips(bands, info), **common, **_imagej_metadata(info, len(shape)))
        return "ImageJ TIFF"
    with tifffile.TiffWriter(path, bigtiff=True, ome=True, byteorder="<") as tiff:
        options = {"compressionargs": {"level": LEVEL}, "metadata": _ome_metadata(info, len(shape))}
        tiff.write(_tiles(bands, info), shape=shape, tile=(TILE, TILE), **common, **options)
    return "OME-TIFF (BigTIFF)"


def _strip_rows(info: OutputInfo) -> int:
    _, height, width = info.shape_ZYX
    return max(1, min(height, STRIP_BYTES // (width * info.dtype.itemsize)))


def _strips(bands: Iterable[np.ndarray], info: OutputInfo) -> Iterator[bytes]:
    """Compressed strips of all sections."""
    order, rows = info.dtype.newbyteorder("<"), _strip_rows(info)
    pieces = (
        band_RX[first : first + rows].astype(order, copy=False)
        for band_RX in bands
        for first in range(0, len(band_RX), rows)
    )
    return _in_threads(lambda piece: zlib.compress(piece.tobytes(), LEVEL), pieces)


def _tiles(bands: Iterable[np.ndarray], info: OutputInfo) -> Iterator[np.ndarray]:
    width = info.shape_ZYX[2]
    for band_RX in bands:
        for left in range(0, width, TILE):
            tile = np.zeros((TILE, TILE), info.dtype)
            part = band_RX[:, left : left + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _in_threads(function: Callable[[np.ndarray], T], items: Iterable[np.ndarray]) -> Iterator[T]:
    """Results in the order of the items, some computed in advance."""
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "affmae-compress") as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _imagej_metadata(info: OutputInfo, axes: int) -> dict[str, Any]:
    z, y, x = info.pixel_nm
    metadata: dict[str, Any] = {
        "axes": "ZYX"[-axes:] + "S",
        "Info": json.dumps({"affmae": info.record}, indent=1),
        "min": 0.0,
        "max": float(max(1, len(info.class_names) - 1)),
    }
    result: dict[str, Any] = {"metadata": metadata}
    if info.dtype.itemsize == 1:  # ImageJ shows larger values through a table of 256 steps, which mixes classes
        metadata["max"] = 255.0
        result["extratags"] = [(_COLOR_MAP, "H", 3 * 256, _color_table(), True)]
    # ImageJ has one unit for all axes: with it, an unknown y or x would read as one such unit.
    if y is not None and x is not None:
        result["resolution"] = (1000 / x, 1000 / y)
        metadata["unit"] = "um"
        if z is not None:
            metadata["spacing"] = z / 1000
    return result


def _color_table() -> tuple[int, ...]:
    """ImageJ's table, all reds, greens and blues as 16-bit numbers: black for class 0, then the project's colors.

    The display range is 0 to 255, so a value is shown in its own color. ImageJ reads the table of a grey image; other
    programs pass over it there, and see the numbers of the classes.
    """
    table = class_colours(256).astype(np.uint16) * 257
    table[0] = 0
    return tuple(table.T.ravel().tolist())


def _ome_metadata(info: OutputInfo, axes: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {"axes": "ZYX"[-axes:], "Name": info.name, "Description": json.dumps(info.record)}
    for axis, size in zip("ZYX", info.pixel_nm, strict=True):
        if size is not None:
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "nm"}
    return metadata
