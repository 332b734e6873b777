"""DigitalMicrograph's DM3 and DM4: images and stacks of Gatan cameras, from their tree of tags.

There is no specification; others have described the format (https://personal.ntu.edu.sg/cbb/info/dmformat). The
complete readers are under the GPL or bring 265 MB along, so this is a small one: it walks the tags, notes where arrays
lie instead of reading them, and takes every image but the thumbnail.

A file is a header (version 3 or 4, length, byte order of values), then a group: two flags, the number of its tags,
the tags. A tag has a kind (20 group, 21 value), a name and, in version 4, its length. Structure is big-endian and
counts have 4 bytes in version 3, 8 in version 4; values have the byte order of the header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from affmae_engine.data.readers.arrays import Array, array_source
from affmae_engine.data.readers.raw import RawArray, check_size
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.data.readers.units import nanometres

_MOST_TAGS, _DEEPEST = 1_000_000, 64
_LONGEST_TEXT = 4096
# Types of values: struct's code. 15 is a struct, 18 a text, 20 an array.
_VALUES = {2: "h", 3: "i", 4: "H", 5: "I", 6: "f", 7: "d", 8: "?", 9: "b", 10: "b", 11: "q", 12: "Q"}
_STRUCT, _TEXT, _ARRAY = 15, 18, 20
# What `DataType` of an image says of its pixels.
_PIXELS = {1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "?", 39: "i8", 40: "u8"}
_COLOR = (8, 23)
"""Four bytes of blue, green, red and nothing or alpha."""

Tags = dict[str, Any]
"""A group: values, `_Stored` arrays and groups by name; tags without a name are called by their number."""


@dataclass(frozen=True)
class _Stored:
    """Where the values of an array tag lie in the file."""

    offset: int
    nbytes: int
    text: str = ""
    """Of a short array of 16-bit numbers, which is how texts are stored."""

    def __str__(self) -> str:
        return self.text


def open_dm(path: Path, options: ReadOptions) -> Found:
    """The images in a DM3 or DM4 file, without its thumbnail.

    Raises:
        InputError: its tags are damaged, it is cut short, or it holds no image of real numbers.
    """
    with reading(path):
        with path.open("rb") as file:
            reader = _TagReader(file, path.stat().st_size)
            tags = reader.root()
        images = [(number, image) for number, image in _images(tags) if isinstance(image.get("Data"), _Stored)]
        if not images:
            raise Refused("it holds no image")
        several = len(images) > 1
        found = [_describe(path, image, number if several else "", reader.order) for number, image in images]
        return [array_source(array, options) for array in found], []


def _images(tags: Tags) -> list[tuple[str, Tags]]:
    """The numbers and `ImageData` of all images but thumbnails."""
    listed = {number: entry["ImageData"] for number, entry in tags["ImageList"].items() if "ImageData" in entry}
    thumbnails = {str(entry.get("ImageIndex")) for entry in tags.get("Thumbnails", {}).values()}
    kept = {number: image for number, image in listed.items() if number not in thumbnails}
    return list((kept or listed).items())


def _describe(path: Path, image: Tags, series: str, order: Literal["<", ">"]) -> Array:
    kind = image.get("DataType")
    if kind not in _PIXELS and kind not in _COLOR:
        raise Refused(f"its values are of type {kind}, not real numbers", "save its real part or modulus")
    dtype = np.dtype(_PIXELS.get(kind, "u1")).newbyteorder(order)
    lengths = [int(n) for n in image["Dimensions"].values()]
    while len(lengths) > 2 and lengths[-1] == 1:
        lengths.pop()
    if not 2 <= len(lengths) <= 4 or min(lengths) < 1:
        raise Refused(f"it has {len(lengths)} axes; images and stacks have 2 to 4")
    # x comes first. A third axis in seconds is time; any other, spectra among them, counts as z.
    calibrations = list(zip("XYZ", image.get("Calibrations", {}).get("Dimension", {}).values(), strict=False))
    third = "T" if any(a == "Z" and str(one.get("Units")) in ("s", "ms", "min") for a, one in calibrations) else "Z"
    axes = f"XY{third}I"[: len(lengths)][::-1]
    shape = tuple(lengths[::-1])
    array = RawArray
    if kind in _COLOR:
        axes, shape, array = f"{axes}S", (*shape, 4), _Colors
    data: _Stored = image["Data"]
    check_size(path, data.offset, shape, dtype)
    if data.nbytes < np.prod(shape, dtype=object) * dtype.itemsize:
        raise Refused("its data is shorter than its dimensions", "the file is damaged; copy it again")
    return Array(
        path=path,
        open=partial(array, path, data.offset, shape, dtype),
        shape=shape,
        dtype=dtype,
        axes=axes,
        format="DigitalMicrograph",
        series=series,
        pixel_nm={axis: nanometres(one.get("Scale"), one.get("Units")) for axis, one in calibrations},
        samples="rgb" if kind in _COLOR else "grey",
    )


class _Colors(RawArray):
    """Pixels of blue, green, red and alpha, as red, green, blue and alpha."""

    def __getitem__(self, selection: tuple[int | slice, ...]) -> np.ndarray:
        *place, sample = selection
        values = super().__getitem__((*place, slice(None)))[..., [2, 1, 0, 3]]
        return values[..., sample]


class _TagReader:
    """Walks the tags of one file; every count is checked against the file's size before it is believed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._tags = file, size, 0
        (version,) = self._unpack(">i")
        self._count = ">q" if version == 4 else ">i"
        self._is_4 = version == 4
        self._unpack(self._count)  # the length of the file
        (little,) = self._unpack(">i")
        self.order: Literal["<", ">"] = "<" if little else ">"

    def root(self) -> Tags:
        """All tags."""
        return self._group(0)

    def _group(self, depth: int) -> Tags:
        if depth > _DEEPEST:
            raise Refused("its tags are nested too deeply")
        self._unpack(">2b")  # sorted, open
        group: Tags = {}
        for number in range(self._number()):
            self._tags += 1
            kind, length = self._unpack(">bH")
            name = self._bytes(length).decode("latin-1") or str(number)
            if self._is_4:
                self._unpack(">q")  # the length of the tag
            if kind == 20:
                group[name] = self._group(depth + 1)
            elif kind == 21:
                group[name] = self._value()
            else:
                raise Refused("its tags are damaged", "copy it again from its origin")
        return group

    def _number(self) -> int:
        (number,) = self._unpack(self._count)
        if not 0 <= number <= _MOST_TAGS - self._tags:
            raise Refused("its tags are damaged", "copy it again from its origin")
        return int(number)

    def _value(self) -> Any:
        if self._bytes(4) != b"%%%%":
            raise Refused("its tags are damaged", "copy it again from its origin")
        described = [self._unpack(self._count)[0] for _ in range(self._number())]
        kind, rest = described[0], described[1:]
        if kind in _VALUES:
            return self._unpack(self.order + _VALUES[kind])[0]
        if kind == _STRUCT:
            return self._unpack(self.order + _fields(rest))
        if kind == _TEXT:
            return self._text(rest[0] * 2)
        if kind == _ARRAY:
            count = rest[-1]
            element = _fields(rest[1:-1]) if rest[0] == _STRUCT else _VALUES[rest[0]]
            nbytes = count * struct.calcsize("=" + element)
            start = self._file.tell()
            text = self._text(nbytes) if rest[0] == 4 and nbytes <= _LONGEST_TEXT else ""
            self._file.seek(start)
            self._skip(nbytes)
            return _Stored(start, nbytes, text)
        raise Refused("its tags are damaged", "copy it again from its origin")

    def _text(self, nbytes: int) -> str:
        codec = "utf-16-le" if self.order == "<" else "utf-16-be"
        return self._bytes(nbytes).decode(codec, "replace")

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))

    def _bytes(self, count: int) -> bytes:
        if count < 0 or count > self._size - self._file.tell():
            raise Refused("it is cut short or its tags are damaged", "copy it again from its origin")
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        if count < 0 or count > self._size - self._file.tell():
            raise Refused("it is cut short or its tags are damaged", "copy it again from its origin")
        self._file.seek(count, 1)


def _fields(described: list[int]) -> str:
    """struct's codes of the fields of a struct: (length of its name, number of fields, then per field: name, type)."""
    return "".join(_VALUES[kind] for kind in described[3 : 3 + 2 * described[1] : 2])
