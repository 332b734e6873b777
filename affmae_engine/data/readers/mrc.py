"""MRC, MAP, REC: stacks and volumes of cryo-EM and tomography programs (MRC2014 and what IMOD made of it).

The header has a fixed length of 1024 bytes: words of 4 bytes, numbered from 1 in the specification
(https://www.ccpem.ac.uk/mrc-format/mrc2014/). Two things are not as the specification says: in files of IMOD
(before version 4.2.23) and of older programs the bytes of mode 0 are unsigned; files of before 2000 have no stamp.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from affmae_engine.data.readers.arrays import Array, array_source
from affmae_engine.data.readers.grey import Colour
from affmae_engine.data.readers.raw import RawArray, check_size
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.data.readers.units import nanometres

_HEADER = 1024
_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", 16: "u1"}
_REFUSED = {3: "complex", 4: "complex", 101: "4-bit"}
_IMOD_STAMP = 1146047817
_VOLUME_STACK = 401


def open_mrc(path: Path, options: ReadOptions) -> Found:
    """The stack or volume in an MRC file.

    Raises:
        InputError: its header is damaged, its values are complex, or it is cut short.
    """
    with reading(path):
        with path.open("rb") as file:
            header = file.read(_HEADER)
        return [array_source(_describe(path, header), options)], []


def _describe(path: Path, header: bytes) -> Array:
    order = _byte_order(header)
    words = struct.unpack(order + "10i6f3i3f2i", header[:96])
    columns, rows, sections, mode = words[:4]
    intervals, cell, axis_words = words[7:10], words[10:13], words[16:19]
    dmin, dmax, space_group, extended = *words[19:21], *words[22:24]
    stamp, flags = struct.unpack(order + "2i", header[152:160])
    if min(columns, rows, sections) < 1 or not 0 <= extended < 1 << 31:
        raise Refused("its header is damaged")
    if mode in _REFUSED:
        raise Refused(f"its values are {_REFUSED[mode]} (mode {mode})", "convert it to mode 0, 1 or 2")
    if mode not in _TYPES:
        raise Refused(f"its mode {mode} is unknown")
    notes = []
    dtype = np.dtype(_TYPES[mode]).newbyteorder(order)
    if mode == 0 and ((stamp == _IMOD_STAMP and not flags & 1) or (dmin >= 0 and dmax > 127)):
        dtype = np.dtype(np.uint8)
        notes.append("bytes read as unsigned")

    # Columns, rows and sections may be any permutation of x, y and z.
    permutation = axis_words if sorted(axis_words) == [1, 2, 3] else (1, 2, 3)
    axes = "".join("XYZ"[axis - 1] for axis in reversed(permutation))
    shape: tuple[int, ...] = (sections, rows, columns)
    depth = intervals[2]
    if space_group == _VOLUME_STACK and 0 < depth < sections and sections % depth == 0 and axes == "ZYX":
        axes, shape = "IZYX", (sections // depth, depth, rows, columns)
        notes.append(f"{sections // depth} volumes of {depth} sections")
    samples: Colour = "grey"
    if mode == 16:
        axes, shape, samples = f"{axes}S", (*shape, 3), "rgb"
    check_size(path, _HEADER + extended, shape, dtype)

    sizes = {
        axis: nanometres(length / n, "angstrom") if n > 0 else None
        for axis, length, n in zip("XYZ", cell, intervals, strict=True)
    }
    if space_group == 0 and depth == 1 < sections:
        sizes["Z"] = None  # a stack of images, not a volume
    if set(sizes.values()) <= {0.1, None}:
        sizes = {}  # one angstrom is what programs write that know none
        notes.append("pixel size of 1 angstrom taken as unknown")
    return Array(
        path=path,
        open=partial(RawArray, path, _HEADER + extended, shape, dtype),
        shape=shape,
        dtype=dtype,
        axes=axes,
        format="MRC",
        pixel_nm=sizes,
        notes=tuple(notes),
        samples=samples,
    )


def _byte_order(header: bytes) -> Literal["<", ">"]:
    """`<` or `>`: the order in which mode and axes make sense; the machine stamp decides between two that do."""
    if len(header) < _HEADER:
        raise Refused("it is cut short: its header is incomplete", "copy it again from its origin")
    sensible: list[Literal["<", ">"]] = []
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        mode = struct.unpack(order + "i", header[12:16])[0]
        axes = struct.unpack(order + "3i", header[64:76])
        if 0 <= mode < 128 and all(0 <= axis <= 3 for axis in axes):
            sensible.append(order)
    if not sensible:
        raise Refused("its header is damaged")
    return ">" if ">" in sensible and (header[212] == 0x11 or "<" not in sensible) else "<"
