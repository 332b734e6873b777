"""Pixel size from what microscopes and programs write into TIFF files: OME-XML, ImageJ, FEI, Zeiss, resolution tags.

The first source that knows an axis wins, in that order. A resolution tag counts only when it gives a size that an
electron micrograph can have (see `units.LARGEST_NM`).
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPageSeries

from affmae_engine.data.readers.source import UNKNOWN_SIZE, PixelSize
from affmae_engine.data.readers.units import from_resolution, nanometres

_UNITS = {2: "inch", 3: "cm"}


def pixel_size(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """Nanometres per voxel along z, y, x; None where the file does not say. Damaged metadata counts as silence."""
    found: PixelSize = UNKNOWN_SIZE
    for read in (_from_ome, _from_imagej, _from_microscope, _from_tags):
        try:
            size = read(file, series, index)
        except Exception:  # vendor metadata is free text: whatever is wrong with it must not cost the image
            continue
        found = tuple(old if old is not None else new for old, new in zip(found, size, strict=True))  # type: ignore[assignment]
    return found


def _from_ome(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    if not file.is_ome or "<!ENTITY" in (file.ome_metadata or ""):
        return UNKNOWN_SIZE
    pixels = [e for e in ElementTree.fromstring(file.ome_metadata).iter() if e.tag.rsplit("}", 1)[-1] == "Pixels"]
    one = pixels[index if index < len(pixels) and series.kind == "ome" else 0].attrib
    z, y, x = (nanometres(one.get(f"PhysicalSize{a}"), one.get(f"PhysicalSize{a}Unit", "µm")) for a in "ZYX")
    return z, y, x


def _from_imagej(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    if not file.is_imagej:
        return UNKNOWN_SIZE
    metadata: dict[str, Any] = file.imagej_metadata or {}
    unit = metadata.get("unit")
    y, x = (
        nanometres(1 / value, metadata.get(f"{axis}unit") or unit) if (value := _ratio(series, tag)) else None
        for axis, tag in (("y", 283), ("x", 282))
    )
    return nanometres(metadata.get("spacing"), metadata.get("zunit") or unit), y, x


def _from_microscope(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    if file.is_fei:
        scan = (file.fei_metadata or {}).get("Scan", {})
        return None, nanometres(scan.get("PixelHeight"), "m"), nanometres(scan.get("PixelWidth"), "m")
    if file.is_sem:
        zeiss: dict[str, Any] = file.sem_metadata or {}
        value = zeiss.get("ap_image_pixel_size") or zeiss.get("ap_pixel_size")
        if value:
            size = nanometres(value[1], value[2])
            return None, size, size
    return UNKNOWN_SIZE


def _from_tags(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    unit = _UNITS.get(int(series.keyframe.tags.valueof(296, 2)))
    return None, from_resolution(_ratio(series, 283), unit), from_resolution(_ratio(series, 282), unit)


def _ratio(series: TiffPageSeries, tag: int) -> float | None:
    value = series.keyframe.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) != 2 or not value[1]:
        return None
    return float(value[0]) / float(value[1])
