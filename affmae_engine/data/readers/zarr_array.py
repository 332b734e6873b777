"""Zarr 2/3 and OME-Zarr 0.1 to 0.5 folders, read chunk by chunk at full resolution.

A missing chunk holds the fill value, as the Zarr specification says. Chunks are decoded by whatever codecs the
metadata names (of a closed list), so this runs in a child process (`sandbox.py`). Links that lead out of the
hierarchy's folder are refused, as is what is no file.
"""

from __future__ import annotations

import math
import os
import stat
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec
from zarr.registry import register_codec
from zarr.storage import LocalStore

from affmae_engine.data.readers.arrays import Array, OneDimensional, array_source, guess_axes, short_name
from affmae_engine.data.readers.files import split_inner
from affmae_engine.data.readers.hierarchy import LocalHierarchy
from affmae_engine.data.readers.limits import LARGEST_RATIO, refuse_inflated
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, Source, reading
from affmae_engine.data.readers.zarr_metadata import ArrayFound, check_metadata, find_arrays
from affmae_engine.errors import InputError


class _ConfinedStore(LocalStore):
    """A local store that reads nothing outside its root, whatever links lie in it."""

    async def get(self, key: str, prototype: Any = None, *args: Any, **options: Any) -> Any:
        root = os.path.realpath(self.root)
        path = os.path.realpath(f"{root}/{key}")
        if not path.startswith(f"{root}/"):
            raise Refused("a link in it leads out of its folder", "only data inside the Zarr folder is read")
        if _is_special(path):  # a pipe would block for ever
            raise Refused(f"{key} in it is neither a file nor a folder")
        return await super().get(key, prototype, *args, **options)


def open_zarr(path: Path, options: ReadOptions) -> Found:
    """Every image array in a hierarchy, and why others were refused.

    Raises:
        InputError: nothing in it can be read.
    """
    file, inner = split_inner(path)
    root = file / inner if inner else file
    tree = LocalHierarchy(root)
    stored = partial(_stored_bytes, root)
    return arrays_found(root, list(find_arrays(tree, labels=options.labels)), options, _opener, stored)


def arrays_found(
    root: Path,
    found: list[ArrayFound | tuple[str, Refused]],
    options: ReadOptions,
    opener: Any,
    stored_bytes: Any = None,
) -> Found:
    """The sources of what `find_arrays` found, and why others were refused.

    Args:
        opener: from root and key to a function that opens the array.
        stored_bytes: from key and an upper limit to the bytes that an array takes on disk; None where nobody knows.
    """
    sources: list[Source] = []
    refused: list[InputError] = []
    for one in found:
        key = one.key if isinstance(one, ArrayFound) else one[0]
        series = key if len(found) > 1 else ""
        try:
            with reading(root, series):
                if not isinstance(one, ArrayFound):
                    raise one[1]
                sources.append(array_source(_describe(root, one, series, opener, stored_bytes), options))
        except InputError as error:
            refused.append(error)
    if not sources:
        raise refused[0] if refused else InputError(f"cannot read {root}: it holds no arrays")
    # Coordinates and tables beside images are no images that were refused.
    return sources, [error for error in refused if not isinstance(error.__cause__, OneDimensional)]


def _describe(root: Path, found: ArrayFound, series: str, opener: Any, stored_bytes: Any) -> Array:
    metadata = found.metadata
    shape = tuple(metadata.get("shape") or ())
    axes = found.axes or guess_axes(shape)
    piece = check_metadata(metadata)
    dtype = np.dtype(metadata.get("data_type", metadata.get("dtype")))
    declared = math.prod(shape) * dtype.itemsize
    if stored_bytes is not None:
        refuse_inflated(declared, stored_bytes(found.key, declared // LARGEST_RATIO + 1), compressed=True)
    open_array = opener(root, found.key)
    if stored_bytes is not None:
        open_array()  # the library may refuse what the list above allows
    stem = short_name(root)
    return Array(
        path=root,
        open=open_array,
        shape=shape,
        dtype=dtype,
        axes=axes,
        format=f"{found.format} (Zarr {metadata['zarr_format']})",
        pixel_nm=found.pixel_nm,
        series=series,
        name=f"{stem}-{_series_name(series)}" if series else stem,
        axes_from="file" if found.axes else "guess",
        piece_bytes=piece,
        samples="rgb" if "S" in axes else "grey",
        isolated=True,
    )


def _opener(root: Path, key: str) -> Any:
    return partial(_open_array, root, key)


class _CheckedBlosc(Blosc):
    """Blosc reads beyond a buffer that is shorter than its header says, and returns what it finds there."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        data = memoryview(buf).cast("B")
        if len(data) < 16 or int.from_bytes(data[12:16], "little") > len(data):
            raise ValueError("a Blosc chunk is cut short")
        return super().decode(buf, out)


class CheckedBloscCodec(BloscCodec):
    """The same for Zarr 3; the registry wants its name to be importable."""

    @cached_property
    def _blosc_codec(self) -> Blosc:
        settings = super()._blosc_codec.get_config()
        settings.pop("id")
        return _CheckedBlosc(**settings)


@cache
def _check_blosc() -> None:
    """Use these decoders in this process, which is a child that reads strangers' files and nothing else."""
    numcodecs.register_codec(_CheckedBlosc, "blosc")
    register_codec("blosc", CheckedBloscCodec)
    zarr.config.set({"codecs.blosc": f"{CheckedBloscCodec.__module__}.{CheckedBloscCodec.__qualname__}"})


def _open_array(root: Path, key: str) -> Any:
    _check_blosc()
    return zarr.open_array(_ConfinedStore(root, read_only=True), path=key, mode="r")


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (a hot path)
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _series_name(series: str) -> str:
    parts = series.split("/")
    # `images/cell/0` and `images/cell/s0` are the full resolution of `images/cell`.
    if len(parts) > 1 and parts[-1] in ("0", "s0"):
        parts = parts[:-1]
    return "-".join(parts)


def _stored_bytes(root: Path, key: str, enough: int) -> int:
    """Bytes of the files under a key; stops counting once there are `enough`."""
    total = 0
    for parent, _, names in os.walk(root / key):
        for name in names:
            total += os.lstat(f"{parent}/{name}").st_size
        if total >= enough:
            break
    return total
