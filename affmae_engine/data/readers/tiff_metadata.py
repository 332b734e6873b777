"""Pixel size from what microscopes and programs write into TIFF files, or into a text file beside them.

The first source that knows an axis wins, in the order of `pixel_size`. Print resolutions count last, and only where
no printer has such a resolution (see `units.from_resolution`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPageSeries

from affmae_engine.data.readers.source import UNKNOWN_SIZE, PixelSize
from affmae_engine.data.readers.units import from_resolution, nanometres

_UNITS = {2: "inch", 3: "cm"}
# DigitalMicrograph: units and sizes along x, y and z.
_GATAN = {"X": (65003, 65009), "Y": (65004, 65010), "Z": (65005, 65011)}
_TESCAN = 50431
_LONGEST_TEXT = 1 << 20


def pixel_size(path: Path, file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """Nanometers per voxel along z, y, x; None where nobody says. Damaged metadata counts as silence."""
    found: PixelSize = UNKNOWN_SIZE
    width = series.keyframe.imagewidth
    readers = (_from_ome, _from_imagej, _from_fei, _from_zeiss, _from_olympus, _from_jeol, _from_gatan, _from_tescan)
    for read in (*readers, lambda *_: _square(beside(path, width)), _from_tags):
        try:
            size = read(file, series, index)
        except Exception:  # vendor metadata is free text: whatever is wrong with it must not cost the image
            continue
        found = tuple(old if old is not None else new for old, new in zip(found, size, strict=True))  # type: ignore[assignment]
    return found


def beside(path: Path, width: int) -> float | None:
    """Pixel size in nanometers from the text file that Hitachi and JEOL microscopes write beside an image.

    Hitachi (`[SemImageFile]`): `PixelSize`, in nanometers. JEOL (`$CM_...`): the scale bar's length in pixels of an
    image as wide as `$CM_FULL_SIZE`, and in micrometers or nanometers.

    Args:
        path: the image; the text has the same name and the ending .txt.
        width: of the image in pixels.
    """
    for name in (path.with_suffix(".txt"), path.with_suffix(".TXT")):
        try:
            if not name.is_file() or name.stat().st_size > _LONGEST_TEXT:
                continue
            data = name.read_bytes()
        except OSError:
            continue
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", "replace")
        if "ImageFile]" in text[:2048]:
            return _hitachi(text, width)
        if "$CM_" in text:
            return _jeol_text(text, width)
    return None


def _hitachi(text: str, width: int) -> float | None:
    size = re.search(r"^PixelSize=\s*([\d.eE+-]+)", text, re.MULTILINE)
    recorded = re.search(r"^DataSize=\s*(\d+)\s*x", text, re.MULTILINE)
    if size is None:
        return None
    # The image may have been saved smaller than it was recorded.
    factor = int(recorded[1]) / width if recorded and int(recorded[1]) > 0 else 1.0
    return nanometres(float(size[1]) * factor, "nm")


def _jeol_text(text: str, width: int) -> float | None:
    bar = re.search(r"^\$\$?SM_MICRON_BAR\s+([\d.]+)", text, re.MULTILINE)
    marker = re.search(r"^\$\$?SM_MICRON_MARKER\s+([\d.]+)\s*([a-zµ]+)", text, re.MULTILINE | re.IGNORECASE)
    full = re.search(r"^\$\$?CM_FULL_SIZE\s+(\d+)", text, re.MULTILINE)
    if bar is None or marker is None or float(bar[1]) <= 0:
        return None
    factor = int(full[1]) / width if full and int(full[1]) > 0 else 1.0
    return nanometres(float(marker[1]) / float(bar[1]) * factor, marker[2])


def _square(size: float | None) -> PixelSize:
    return None, size, size


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


def _from_fei(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """FEI and Thermo Fisher: sizes of a scanned image in meters; else the width of the field over that of the image."""
    if not file.is_fei:
        return UNKNOWN_SIZE
    metadata = file.fei_metadata or {}
    scan = metadata.get("Scan", {})
    y, x = nanometres(scan.get("PixelHeight"), "m"), nanometres(scan.get("PixelWidth"), "m")
    for beam in (metadata.get(name) or {} for name in ("EBeam", "IBeam", "IRBeam")) if x is None else ():
        width = nanometres(beam.get("HFW"), "m")
        if width is not None:
            return _square(float(f"{width / series.keyframe.imagewidth:.10g}"))
    return None, y, x


def _from_zeiss(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """Zeiss SmartSEM: `AP_IMAGE_PIXEL_SIZE`; older versions write only that of their 1024 pixel wide screen.

    `AP_WIDTH`, the width of the field, tells the size in the image whatever its width is.
    """
    if not file.is_sem:
        return UNKNOWN_SIZE
    zeiss: dict[str, Any] = file.sem_metadata or {}
    for key, pixels in (("ap_image_pixel_size", 1), ("ap_width", series.keyframe.imagewidth), ("ap_pixel_size", 1)):
        value = zeiss.get(key)
        if value and len(value) > 2 and (size := nanometres(float(value[1]) / pixels, value[2])):
            return _square(size)
    screen = zeiss.get("")  # unnamed numbers in SI units; the fourth is the size of a pixel of the screen
    if screen and len(screen) > 3:
        return _square(nanometres(float(screen[3]) * 1024 / series.keyframe.imagewidth, "m"))
    return UNKNOWN_SIZE


def _from_olympus(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """Olympus and EMSIS (tag 33560): meters."""
    if not file.is_sis:
        return UNKNOWN_SIZE
    sis: dict[str, Any] = file.sis_metadata or {}
    return None, nanometres(sis.get("pixelsizey"), "m"), nanometres(sis.get("pixelsizex"), "m")


def _from_jeol(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """JEOL TEM (SightX): the print resolution is that of the camera, to be divided by the magnification."""
    page = series.keyframe
    text = page.description.strip("\r\n\t \x00\x01")
    if "JEOL" not in str(page.tags.valueof(271, "")) or not text.startswith("<") or "<!ENTITY" in text:
        return UNKNOWN_SIZE
    imaging = next(e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("ImageFormingSystem"))
    if imaging.findtext("ModeString") != "MAG":  # diffraction
        return UNKNOWN_SIZE
    magnification = float(imaging.findtext("SelectorValue", "nan"))
    unit = _UNITS.get(int(page.tags.valueof(296, 2)))
    y, x = (
        nanometres(1 / value / magnification, unit) if (value := _ratio(series, tag)) else None for tag in (283, 282)
    )
    return None, y, x


def _from_gatan(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    tags = series.keyframe.tags
    sizes = {}
    for axis, (unit, size) in _GATAN.items():
        text = tags.valueof(unit)
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        sizes[axis] = nanometres(tags.valueof(size), str(text or "").strip("\0 "))
    return sizes["Z"], sizes["Y"], sizes["X"]


def _from_tescan(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    """TESCAN: lines of text in a tag, sizes in meters."""
    data = series.keyframe.tags.valueof(_TESCAN, b"")
    text = data.decode("latin-1") if isinstance(data, bytes) else str(data)
    y, x = (
        nanometres(found[1], "m") if (found := re.search(rf"PixelSize{axis}=\s*([\d.eE+-]+)", text)) else None
        for axis in "YX"
    )
    return None, y, x


def _from_tags(file: TiffFile, series: TiffPageSeries, index: int) -> PixelSize:
    unit = _UNITS.get(int(series.keyframe.tags.valueof(296, 2)))
    return None, from_resolution(_ratio(series, 283), unit), from_resolution(_ratio(series, 282), unit)


def _ratio(series: TiffPageSeries, tag: int) -> float | None:
    value = series.keyframe.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) != 2 or not value[1] or not value[0]:
        return None
    return float(value[0]) / float(value[1])
