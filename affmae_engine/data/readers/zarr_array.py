"""Zarr 2/3 and OME-Zarr 0.4/0.5 folders as sources, read chunk by chunk at full resolution.

A missing chunk holds the fill value, as the Zarr specification says. A chunk is decoded only as far as its array's
metadata allows (`zarr_codecs.py`). Links that lead out of the hierarchy's folder are refused, as is what is no file.
"""

from __future__ import annotations

import math
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from affmae_engine.data.readers.axes import Sections, arrange, check_channel
from affmae_engine.data.readers.grey import Colour, ValueRule, grey_rule
from affmae_engine.data.readers.limits import LARGEST_RATIO, refuse_inflated
from affmae_engine.data.readers.source import Refused, Source, SourceInfo, reading
from affmae_engine.data.readers.zarr_codecs import decoding_at_most
from affmae_engine.data.readers.zarr_metadata import ArrayFound, OneDimensional, check_array, find_arrays
from affmae_engine.errors import InputError

# The library's remarks concern metadata that `check_array` has looked at.
warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)


class _ConfinedStore(LocalStore):
    """A local store that reads nothing outside its root, whatever links lie in it."""

    async def get(self, key: str, *args: Any, **options: Any) -> Any:
        root = os.path.realpath(self.root)
        path = os.path.realpath(f"{root}/{key}")
        if not path.startswith(f"{root}/"):
            raise Refused("a link in it leads out of its folder", "only data inside the Zarr folder is read")
        if _is_special(path):  # a pipe would block for ever
            raise Refused(f"{key} in it is neither a file nor a folder")
        return await super().get(key, *args, **options)


class ZarrSource(Source):
    """One array of a Zarr hierarchy."""

    def __init__(
        self, info: SourceInfo, array: str, axes: str, sections: Sections, sample: int, rule: ValueRule
    ) -> None:
        super().__init__(info)
        self._array, self._axes, self._sections, self._sample, self._rule = array, axes, sections, sample, rule

    def _open(self) -> Any:
        return _open_array(self.info.path, self._array)

    def _close(self, handle: Any) -> None:
        pass

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        block = np.empty((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        run = self._run_length()
        start = z[0]
        while start < z[1] and block.size:
            stop = min(z[1], (start // run + 1) * run)
            block[start - z[0] : stop - z[0]] = self._read_run(handle, start, stop, y, x)
            start = stop
        return block

    def _run_length(self) -> int:
        """Sections that follow each other along the last section axis, so that one request can fetch them."""
        lengths = [n for a, n in zip(self._sections.axes, self._sections.shape, strict=True) if a != "C"]
        return lengths[-1] if lengths else 1

    def _read_run(self, handle: Any, start: int, stop: int, y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        leading = list(self._sections.index(start))
        moving = max((i for i, a in enumerate(self._sections.axes) if a != "C"), default=None)
        selection: list[Any] = []
        kept = ""
        position = 0
        for letter in self._axes:
            if letter in "YX":
                selection.append(slice(*(y if letter == "Y" else x)))
            elif letter == "S":
                selection.append(slice(None))
            else:
                chosen: Any = leading[position]
                if position == moving:
                    chosen = slice(chosen, chosen + stop - start)
                selection.append(chosen)
                letter = "z" if position == moving else ""
                position += 1
            kept += letter
        with decoding_at_most(_most_decoded(handle)):
            raw = np.asarray(handle[tuple(selection)])
        order = [kept.index(letter) for letter in "zYXS" if letter in kept]
        raw = raw.transpose(order)
        if "z" not in kept:
            raw = raw[None]
        if "S" in kept and self._rule.colour == "grey":
            raw = raw[..., self._sample]
        return self._rule(raw)


def open_zarr(root: Path, *, channel: int | None, labels: bool) -> tuple[list[Source], list[InputError]]:
    """Every image array in a hierarchy, and why others were refused.

    Raises:
        InputError: nothing in it can be read.
    """
    sources: list[Source] = []
    refused: list[InputError] = []
    found = list(find_arrays(root, labels=labels))
    several = len(found) > 1
    for one in found:
        folder = one.folder if isinstance(one, ArrayFound) else one[0]
        series = folder.relative_to(root).as_posix() if several else ""
        try:
            with reading(root, series):
                if not isinstance(one, ArrayFound):
                    raise one[1]
                sources.append(_describe(root, one, series, channel, labels))
        except InputError as error:
            refused.append(error)
    if not sources:
        raise refused[0] if refused else InputError(f"cannot read {root}: it holds no arrays")
    # Coordinates and tables beside images are no images that were refused.
    return sources, [error for error in refused if not isinstance(error.__cause__, OneDimensional)]


def _describe(root: Path, found: ArrayFound, series: str, channel: int | None, labels: bool) -> ZarrSource:
    check_array(found.folder)
    name = found.folder.relative_to(root).as_posix()
    array = _open_array(root, name)
    if 0 in array.shape:
        raise Refused("one of its axes has length 0", "there is nothing to read in it")
    declared = math.prod(array.shape) * array.dtype.itemsize
    refuse_inflated(declared, _stored_bytes(found.folder, declared // LARGEST_RATIO + 1), compressed=True)
    leading = "".join(letter for letter in found.axes if letter not in "YXS")
    sizes = tuple(n for letter, n in zip(found.axes, array.shape, strict=True) if letter not in "YXS")
    sections, notes = arrange(leading, sizes, channel if "C" in leading else None)
    colour: Colour = "grey"
    sample = 0
    if "S" in found.axes:
        count = array.shape[found.axes.index("S")]
        colour = "rgb" if channel is None and count >= 3 else "grey"
        sample = channel or 0
    if "C" not in leading:
        check_channel(channel, array.shape[found.axes.index("S")] if "S" in found.axes else 1)
    rule, value_notes = grey_rule(np.dtype(array.dtype), colour=colour, labels=labels)
    height, width = (array.shape[found.axes.index(letter)] for letter in "YX")
    stem = root.name.removesuffix(".zarr").removesuffix(".ome")
    info = SourceInfo(
        path=root,
        series=series,
        name=f"{stem}-{_series_name(series)}" if series else stem,
        shape_ZYX=(sections.count, height, width),
        dtype=rule.dtype,
        pixel_nm=found.pixel_nm,
        format=f"{found.format} (Zarr {array.metadata.zarr_format})",
        notes=(*found.notes, *notes, *value_notes),
        value_offset=rule.offset,
    )
    return ZarrSource(info, name, found.axes, sections, sample, rule)


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (a hot path)
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _most_decoded(array: Any) -> int:
    """Bytes that any step of decoding may yield: a filter or an inner index may add a little to a chunk."""
    return 2 * math.prod(array.shards or array.chunks) * array.dtype.itemsize + (1 << 20)


def _series_name(series: str) -> str:
    parts = series.split("/")
    # `images/cell/0` and `images/cell/s0` are the full resolution of `images/cell`.
    if len(parts) > 1 and parts[-1] in ("0", "s0"):
        parts = parts[:-1]
    return "-".join(parts)


def _open_array(root: Path, name: str) -> Any:
    return zarr.open_array(_ConfinedStore(root, read_only=True), path="" if name == "." else name, mode="r")


def _stored_bytes(folder: Path, enough: int) -> int:
    """Bytes of the files under `folder`; stops counting once there are `enough`."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += os.lstat(f"{parent}/{name}").st_size
        if total >= enough:
            break
    return total
