"""NumPy's .npy: one array, never one of objects (which would be a pickle)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from numpy.lib import format as npy

from affmae_engine.data.readers.arrays import Array, array_source, guess_axes
from affmae_engine.data.readers.raw import RawArray, check_size
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading


def open_npy(path: Path, options: ReadOptions) -> Found:
    """The array in a .npy file.

    Raises:
        InputError: it holds objects, is cut short, or cannot be an image.
    """
    with reading(path):
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, column_major, dtype = read(file)
            offset = file.tell()
        if dtype.hasobject:
            raise Refused("it holds Python objects, which are never loaded", "save it as an array of numbers")
        check_size(path, offset, shape, dtype)
        axes = guess_axes(shape)
        # Column-major arrays are row-major ones with the axes in reverse.
        stored = shape[::-1] if column_major else shape
        array = Array(
            path=path,
            open=partial(RawArray, path, offset, stored, dtype),
            shape=stored,
            dtype=dtype,
            axes=axes[::-1] if column_major else axes,
            format="NumPy",
            axes_from="guess",
            samples="rgb" if "S" in axes else "grey",
        )
        return [array_source(array, options)], []
