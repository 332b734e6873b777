"""The contract that every file format is put behind: a grey (z, y, x) array with a few facts, read lazily.

A `Source` holds no open file until it is read from, forgets its handles when it is copied, pickled or carried into
another process (tifffile's handles corrupt data when shared over a fork), and reads only the pages, strips, tiles or
chunks that a request touches. How colours, bit depths, signs and byte orders become grey values is the same for all
formats and lives in `grey.py`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from affmae_engine.errors import AffmaeError, ConfigError, InputError, ResourceError, one_line, passing

PixelSize = tuple[float | None, float | None, float | None]
UNKNOWN_SIZE: PixelSize = (None, None, None)


_CHANNEL, _AXES = "_AFFMAE_READ_CHANNEL", "_AFFMAE_READ_AXES"
AXES = "TCZYX"
"""The letters that axes are named by."""


@dataclass(frozen=True)
class ReadOptions:
    """How a user wants files to be read.

    Attributes:
        channel: which channel of multi-channel images; None takes the first and turns colors into luminance.
        labels: read as label maps: numbers are kept as they are (see `grey.py`).
        axes: one letter per axis of the file (of `AXES`), in place of what it says or what is guessed; "" for that.
    """

    channel: int | None = None
    labels: bool = False
    axes: str = ""

    @classmethod
    def with_defaults(cls, channel: int | None, labels: bool, axes: str) -> ReadOptions:
        """These options, and where they say nothing those of `reading_as`. Channels are those of images only."""
        if channel is None and not labels and os.environ.get(_CHANNEL, "").isdecimal():
            channel = int(os.environ[_CHANNEL])
        return cls(channel, labels, check_axes(axes or os.environ.get(_AXES, "")))


def check_axes(axes: str) -> str:
    """Axes in capitals. Raises ConfigError unless they are different letters of `AXES` with Y and X among them."""
    letters = axes.upper()
    if letters and (set(letters) - set(AXES) or len(set(letters)) != len(letters) or not {"Y", "X"} <= set(letters)):
        raise ConfigError(
            f"axes {axes!r} are not one letter per axis: z, y, x, c (channel) or t (time), with y and x among them",
            "for example --axes YXZ for sections that come last",
        )
    return letters


@contextlib.contextmanager
def reading_as(channel: int | None = None, axes: str = "") -> Iterator[None]:
    """Read files like this inside the block, in this process and those that it starts.

    Raises:
        ConfigError: see `check_axes`.
    """
    chosen = {_CHANNEL: "" if channel is None else str(channel), _AXES: check_axes(axes)}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update({name: value for name, value in chosen.items() if value})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class SourceInfo:
    """What is known about one image or stack before any pixel is read."""

    path: Path
    """The file, or the root folder of a Zarr hierarchy."""
    series: str
    """Which image inside the file; empty when the file holds only one."""
    name: str
    """Short name made from the file and the series; not yet unique nor safe as an array name."""
    shape_ZYX: tuple[int, int, int]
    """Sections, rows, columns."""
    dtype: np.dtype[Any]
    """Of the values that `Source.read` returns: native byte order."""
    pixel_nm: PixelSize
    """Voxel size in nanometres along z, y, x; None where the file does not say."""
    format: str
    """Format in words, for example `OME-TIFF`."""
    notes: tuple[str, ...] = ()
    """What was done to the values or assumed about the axes, one short clause each."""
    value_offset: int = 0
    """Added to the file's signed integers to store them unsigned."""
    section_axes: str = "Z"
    """What the sections are unrolled from: `Z`, `T` (a time series), or several such as `TZ`, slowest first."""
    section_shape: tuple[int, ...] = ()
    """Lengths of `section_axes`; their product is the number of sections. Empty: one axis of all sections."""
    questions: tuple[str, ...] = ()
    """What looks wrong about axes or pixel size, each with the option that settles it; to be shown prominently."""

    @property
    def nbytes(self) -> int:
        """Bytes of all values, uncompressed."""
        z, y, x = self.shape_ZYX
        return z * y * x * self.dtype.itemsize


class Source(ABC):
    """One image or stack of a file. Safe to share between threads; reads are serialised, so copy it for parallelism."""

    parallel = True
    """Whether copies can read different parts at once without repeating work."""
    isolated = False
    """Whether its decoder is not safe by construction, so that `sandbox.py` has to run it."""
    piece_bytes = 0
    """The largest part that is decoded as a whole."""
    _transient: tuple[str, ...] = ("_handle", "_owner", "_lock")

    def __init__(self, info: SourceInfo) -> None:
        self.info = info
        self._handle: Any = None
        self._owner = 0
        self._lock = threading.RLock()

    def read(self, z: slice, y: slice, x: slice) -> np.ndarray:
        """The block [z, y, x] as grey values of `info.dtype`.

        Slices are plain (step 1) and are clipped to the image like numpy's.

        Raises:
            InputError: the data there is damaged or cannot be decoded; names the file.
            ResourceError: it cannot be read just now, see `reading`.
        """
        bounds = [s.indices(n) for s, n in zip((z, y, x), self.info.shape_ZYX, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError("a Source is read with slices of step 1")
        starts = [(start, max(start, stop)) for start, stop, _ in bounds]
        with self._lock, reading(self.info.path, self.info.series):
            if self._handle is None or self._owner != os.getpid():
                self._handle, self._owner = self._open(), os.getpid()
            block = self._read(self._handle, *starts)
        assert block.shape == tuple(stop - start for start, stop in starts), (block.shape, starts)
        return np.ascontiguousarray(block, dtype=self.info.dtype)

    def close(self) -> None:
        """Release the file. Reading again reopens it."""
        with self._lock:
            if self._handle is not None and self._owner == os.getpid():
                self._close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self._transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle, self._owner, self._lock = None, 0, threading.RLock()

    @abstractmethod
    def _open(self) -> Any:
        """Open the file in this process and return whatever `_read` needs."""

    @abstractmethod
    def _close(self, handle: Any) -> None:
        """Close what `_open` returned."""

    @abstractmethod
    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        """Read the block between the given (start, stop) pairs, already grey."""


Found = tuple[list[Source], list[InputError]]
"""What a reader finds in a file: its images, and why others of several were refused."""


class Refused(Exception):
    """Why a file is not taken, without its name; `reading` adds the name and makes an `InputError` of it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@contextlib.contextmanager
def reading(path: Path, series: str = "") -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged file into one `InputError` that names the file.

    Decoders of image formats raise a dozen unrelated types on hostile input (ZeroDivisionError and AssertionError
    among them), so this one place catches `Exception`; our own errors pass through. What says nothing about the file,
    a network share that is away for a moment or too little memory, becomes a `ResourceError`: a caller that throws
    away what a damaged file has left must not do so for it.
    """
    where = f"{path} [{series}]" if series else f"{path}"
    try:
        yield
    except AffmaeError:
        raise
    except Exception as error:
        raise _named(error, where) from error


def _named(error: Exception, where: str) -> AffmaeError:
    """What a user is told of an exception met in reading `where`."""
    now = passing(error)
    if now is not None:
        return ResourceError(f"cannot read {where}: {now[0]}", f"{now[1]}; or leave it out")
    match error:
        case Refused():
            return InputError(f"cannot read {where}: {error.message}", error.hint)
        case FileNotFoundError():
            return InputError(f"cannot read {where}: no such file", "check the path")
        case PermissionError():
            return InputError(f"cannot read {where}: permission was denied", "check who may read it")
        case ValueError() | OSError() | RuntimeError():  # NotImplementedError is a RuntimeError
            what = one_line(error)
        case _:  # a decoder stumbled: its message says nothing to a user
            what = f"its structure is damaged ({type(error).__name__}: {one_line(error, 60)})"
    return InputError(f"cannot read {where}: {what}", "is the file complete and undamaged?")
