"""Lengths in the spellings that microscopes, ImageJ, OME and TIFF tags use, in nanometres."""

from __future__ import annotations

import math

_NANOMETRES = {
    "pm": 1e-3, "picometer": 1e-3, "picometre": 1e-3,
    "a": 0.1, "angstrom": 0.1, "ångström": 0.1, "angstroem": 0.1,
    "nm": 1.0, "nanometer": 1.0, "nanometre": 1.0,
    "um": 1e3, "micron": 1e3, "microns": 1e3, "micrometer": 1e3, "micrometre": 1e3,
    "mm": 1e6, "millimeter": 1e6, "millimetre": 1e6,
    "cm": 1e7, "centimeter": 1e7, "centimetre": 1e7,
    "m": 1e9, "meter": 1e9, "metre": 1e9,
    "in": 2.54e7, "inch": 2.54e7, "inches": 2.54e7,
}  # fmt: skip

LARGEST_NM = 1000.0
"""Larger sizes in a print resolution are about paper or screens: printers end at 5080 dots per inch, 5000 nm."""


def nanometres(value: object, unit: object) -> float | None:
    """`value` in `unit` as nanometres; None when either is missing, unknown, not finite or not positive."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    text = str(unit or "").strip().lower()
    text = text.replace("\\u00b5", "u").replace("µ", "u").replace("μ", "u").replace("å", "a").rstrip("s. ")
    factor = _NANOMETRES.get(text) or _NANOMETRES.get(text + "s")
    if factor is None or not math.isfinite(number) or number <= 0:
        return None
    # Ten significant digits: 0.0046 um is 4.6 nm, not 4.6000000000000005.
    return float(f"{number * factor:.10g}")


def from_resolution(pixels_per_unit: float | None, unit: object) -> float | None:
    """Pixel size from a print resolution (TIFF XResolution, PNG pHYs, JPEG density), if it can be that of an EM image.

    Dots per inch are what programs write when they know nothing; sizes above `LARGEST_NM` count as unknown.
    """
    if not pixels_per_unit or not math.isfinite(pixels_per_unit) or pixels_per_unit <= 0:
        return None
    size = nanometres(1 / pixels_per_unit, unit)
    return size if size is not None and size <= LARGEST_NM else None
