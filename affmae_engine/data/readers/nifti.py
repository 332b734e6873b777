"""NIfTI-1 and NIfTI-2 in one file (.nii): volumes in column-major order behind a header of fixed length.

Offsets and codes are those of nifti1.h and nifti2.h (https://nifti.nimh.nih.gov). Orientation in space is ignored:
sections are those of the third axis.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from affmae_engine.data.readers.arrays import Array, array_source
from affmae_engine.data.readers.grey import Colour, grey_rule
from affmae_engine.data.readers.raw import RawArray, check_size
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.data.readers.units import nanometres

_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 128: "u1", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
    2304: "u1",
}  # fmt: skip
_SAMPLES = {128: 3, 2304: 4}  # RGB and RGBA
_UNITS = {1: "m", 2: "mm", 3: "um"}


def open_nifti(path: Path, options: ReadOptions) -> Found:
    """The volume in a NIfTI file.

    Raises:
        InputError: its header is damaged, its values are complex, it is cut short, or it is one of two files.
    """
    with reading(path):
        with path.open("rb") as file:
            header = file.read(540)
        return [array_source(_describe(path, header), options)], []


def _describe(path: Path, header: bytes) -> Array:
    order: Literal["<", ">"] = "<" if header[:4] in (b"\x5c\1\0\0", b"\x1c\2\0\0") else ">"
    second = header[4:7] in (b"n+2", b"ni2")
    if header[344:347] == b"ni1" or header[4:7] == b"ni2":
        raise Refused("its pixels are in a second file (.img)", "save both as one .nii")
    # Both versions have the same fields, in different places and widths.
    where = ("8q", 16, "h", 12, "8d", 104, "q", 168, "2d", 176, "i", 500)
    if not second:
        where = ("8h", 40, "h", 70, "8f", 76, "f", 108, "2f", 112, "b", 123)
    if len(header) < (540 if second else 348):
        raise Refused("it is cut short: its header is incomplete", "copy it again from its origin")
    dims, (kind,), steps, (start,), (slope, intercept), (units,) = (
        struct.unpack_from(order + code, header, place) for code, place in zip(where[::2], where[1::2], strict=True)
    )
    rank = dims[0]
    if not 1 <= rank <= 7 or any(n < 1 for n in dims[1 : rank + 1]) or not 0 <= start < 1 << 40:
        raise Refused("its header is damaged")
    if kind not in _TYPES:
        raise Refused(f"its values are of type {kind}, not real numbers", "save it with 8 or 16 bits")
    lengths = list(dims[1 : rank + 1])
    while len(lengths) > 4 and lengths[-1] == 1:
        lengths.pop()
    if len(lengths) > 4:
        raise Refused(f"it has {len(lengths)} axes; images and stacks have 2 to 4")
    lengths += [1] * (2 - len(lengths))
    dtype = np.dtype(_TYPES[kind]).newbyteorder(order)
    axes, shape = "XYZT"[: len(lengths)][::-1], tuple(lengths[::-1])
    samples: Colour = "grey"
    if kind in _SAMPLES:
        axes, shape, samples = f"{axes}S", (*shape, _SAMPLES[kind]), "rgb"
    check_size(path, int(start), shape, dtype)
    # A slope of 0 means that values are stored as they are.
    scale = (slope, intercept) if slope and math.isfinite(slope) and math.isfinite(intercept) else (1.0, 0.0)
    return Array(
        path=path,
        open=partial(RawArray, path, int(start), shape, dtype),
        shape=shape,
        dtype=dtype,
        axes=axes,
        format="NIfTI",
        pixel_nm={
            axis: nanometres(abs(step), _UNITS.get(units & 7)) for axis, step in zip("XYZ", steps[1:4], strict=True)
        },
        samples=samples,
        rule=lambda colour, labels: grey_rule(dtype, colour=colour, labels=labels, scale=scale),
    )
