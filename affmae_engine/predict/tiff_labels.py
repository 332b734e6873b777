"""Labels as TIFF, written while they are computed.

Two dialects. Below 4 GB of labels: an ImageJ hyperstack in compressed strips, which plain ImageJ, Fiji, napari and
every TIFF library open with the voxel size in place. From 4 GB on: BigTIFF with OME metadata in compressed tiles, for
Bio-Formats (Fiji), napari and QuPath. ImageJ's own decoder refuses tiles, BigTIFF and zstd, hence strips and deflate
for as long as classic TIFF lasts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from affmae_engine.predict.label_rows import LabelRows, OutputInfo, regroup

IMAGEJ_LIMIT = (1 << 32) - (1 << 25)
"""Largest volume in bytes for the ImageJ dialect: classic TIFF's 4 GiB less room for the page directories."""

IMAGEJ_PLANE_LIMIT = (1 << 31) - 1
"""Java arrays, and with them ImageJ's planes, end here."""

STRIP_BYTES = 1 << 18
TILE = 512
LEVEL = 6


def fits_imagej(info: OutputInfo) -> bool:
    """Whether plain ImageJ can open these labels as one stack."""
    _, height, width = info.shape_ZYX
    return info.nbytes <= IMAGEJ_LIMIT and height * width <= IMAGEJ_PLANE_LIMIT and info.dtype.itemsize <= 2


def write_tiff(path: Path, info: OutputInfo, rows: Iterable[LabelRows]) -> str:
    """Write all rows to `path`, which the caller makes appear atomically.

    A volume of one section becomes a 2-D image.

    Returns:
        the dialect in words.
    """
    shape = info.shape_ZYX if info.shape_ZYX[0] > 1 else info.shape_ZYX[1:]
    common: dict[str, Any] = {
        "shape": shape,
        "dtype": info.dtype,
        "photometric": "minisblack",
        "compression": "zlib",
        "software": "affmae",
    }
    if fits_imagej(info):
        height, width = info.shape_ZYX[1:]
        count = max(1, min(height, STRIP_BYTES // (width * info.dtype.itemsize)))
        with tifffile.TiffWriter(path, imagej=True, byteorder="<") as tiff:
            # The explicit sample axis keeps tifffile from taking images one pixel wide for a line of samples.
            common["shape"] = (*shape, 1)
            tiff.write(_strips(rows, info, count), rowsperstrip=count, **common, **_imagej_metadata(info, len(shape)))
        return "ImageJ TIFF"
    with tifffile.TiffWriter(path, bigtiff=True, ome=True, byteorder="<") as tiff:
        options = {"compressionargs": {"level": LEVEL}, "metadata": _ome_metadata(info, len(shape))}
        tiff.write(_tiles(rows, info), tile=(TILE, TILE), **common, **options)
    return "OME-TIFF (BigTIFF)"


def _strips(rows: Iterable[LabelRows], info: OutputInfo, count: int) -> Iterator[bytes]:
    order = info.dtype.newbyteorder("<")
    for piece in regroup(rows, info.shape_ZYX[1], count):
        yield zlib.compress(piece.labels_RX.astype(order, copy=False).tobytes(), LEVEL)


def _tiles(rows: Iterable[LabelRows], info: OutputInfo) -> Iterator[np.ndarray]:
    height, width = info.shape_ZYX[1:]
    for piece in regroup(rows, height, TILE):
        for left in range(0, width, TILE):
            tile = np.zeros((TILE, TILE), info.dtype)
            part = piece.labels_RX[:, left : left + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _imagej_metadata(info: OutputInfo, axes: int) -> dict[str, Any]:
    z, y, x = info.pixel_nm
    metadata: dict[str, Any] = {
        "axes": "ZYX"[-axes:] + "S",
        "Info": json.dumps({"affmae": info.record()}, indent=1),
        "min": 0.0,
        "max": float(max(1, len(info.class_names) - 1)),
    }
    result: dict[str, Any] = {"metadata": metadata}
    # ImageJ has one unit for all axes: with it, an unknown y or x would read as one such unit.
    if y is not None and x is not None:
        result["resolution"] = (1000 / x, 1000 / y)
        metadata["unit"] = "um"
        if z is not None and axes == 3:
            metadata["spacing"] = z / 1000
    return result


def _ome_metadata(info: OutputInfo, axes: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {"axes": "ZYX"[-axes:], "Name": info.name, "Description": json.dumps(info.record())}
    for axis, size in zip("ZYX", info.pixel_nm, strict=True):
        if size is not None:
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "nm"}
    return metadata
