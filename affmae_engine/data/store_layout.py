"""Where things lie in a dataset store, in what shapes, under what names; no I/O here.

A store is one Zarr v3 group:

    em.zarr/zarr.json             attributes "affmae": schema version, statistics of the whole, class names
    em.zarr/images/NAME/0         one array (z, y, x) per image or stack; NAME is an OME-Zarr 0.5 image
    em.zarr/labels/NAME/0         its label map, where there is one; an OME-Zarr 0.5 label image
    em.zarr/affmae/ledger.jsonl   what is finished, chunk by chunk and image by image (see `ledger.py`)
    em.zarr/affmae/manifest.json  what was taken, skipped and why, for people and scripts
    em.zarr/affmae/overview.png   the contact sheet
    em.zarr/affmae/clean.png      what `ingest --clean` left out or cropped

Chunks are one section thick and at most 256 x 256, because training cuts random two-dimensional crops. A shard, one
file, holds whole rows of chunks and up to 32 MiB, and is the unit in which a store is written, so that the ledger can
tell a missing chunk from an empty one. Legend: Z sections, Y rows, X columns.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.source import PixelSize
from affmae_engine.data.statistics import Statistics

SCHEMA_VERSION = 1
_CHUNK = 256
_SHARD_BYTES = 32 << 20
_SHARD_CHUNKS = 1024  # the index of a shard is read with every crop: 16 bytes per chunk
_LONGEST_NAME = 80

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class StorePaths:
    """Paths inside a store."""

    root: Path

    @property
    def private(self) -> Path:
        """Folder of everything that is not Zarr data."""
        return self.root / "affmae"

    @property
    def ledger(self) -> Path:
        """What is finished."""
        return self.private / "ledger.jsonl"

    @property
    def manifest(self) -> Path:
        """What was taken and skipped, for people."""
        return self.private / "manifest.json"

    @property
    def overview(self) -> Path:
        """The contact sheet."""
        return self.private / "overview.png"

    @property
    def clean_sheet(self) -> Path:
        """The images that `ingest --clean` decided about."""
        return self.private / "clean.png"

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
        return self.private / "lock"

    def node(self, name: str, *, labels: bool = False) -> Path:
        """Group of an image or of its labels."""
        return self.root / ("labels" if labels else "images") / name

    def array(self, name: str, *, labels: bool = False) -> Path:
        """The full-resolution array in that group."""
        return self.node(name, labels=labels) / "0"


@dataclass(frozen=True)
class StoredImage:
    """One finished image or stack of a store."""

    name: str
    """Name of its array: letters, digits, `.`, `_`, `-`; unique even without regard to case."""
    shape_ZYX: Shape
    dtype: np.dtype[Any]
    pixel_nm: PixelSize
    statistics: Statistics
    source_path: str
    source_series: str
    sha256: str
    """Of the source file's content, or of all files of a Zarr folder."""
    labelled: bool = False
    notes: tuple[str, ...] = ()
    format: str = ""
    value_offset: int = 0
    """Added to the source's signed integers to store them unsigned."""
    channel: int | None = None
    source_size: int = 0
    source_mtime_ns: int = 0
    source_files: int = 1
    """Files that the image was made of; more than one for a stack of sections in files of their own."""
    labels_dtype: str = ""
    labels_sha256: str = ""
    pixels_hash: str = ""
    """Equal for equal pixels: SHA-256 of shape, type, the CRC-32 of the pixels of every shard, and the statistics."""
    copies: tuple[str, ...] = ()
    """`content_key` of other files that have the same pixels."""

    @property
    def series_group(self) -> str:
        """Equal for the images of one numbered series: folders, file name and name inside the file, numbers as `#`.

        Sections may be numbered in any of them: files of a folder, a folder for each, arrays of a group.
        """
        path = Path(self.source_path)
        named = f"{path.parent}/{path.stem}" + (f"[{self.source_series}]" if self.source_series else "")
        return re.sub(r"[0-9]+", "#", named)

    @property
    def content_key(self) -> str:
        """Equal for images from files with the same bytes, wherever they are."""
        return f"{self.sha256} {self.source_series} {self.channel}"

    @property
    def identity_keys(self) -> tuple[tuple[str, str], ...]:
        """Equal for images with the same pixels and labels: by its own file first, then by those of its copies."""
        return tuple((key, self.labels_sha256) for key in (self.content_key, *self.copies))

    def same_pixels(self, other: StoredImage) -> bool:
        """Whether two images have the same pixels and labels."""
        mine, theirs = ((i.pixels_hash, i.labels_sha256) for i in (self, other))
        return mine == theirs and bool(self.pixels_hash)

    @property
    def identity(self) -> dict[str, Any]:
        """What half an image must have in common with a source to be continued from it; plain JSON values."""
        return {
            "path": self.source_path,
            "key": [self.sha256, self.source_series, self.channel, self.labels_sha256],
            "shape": list(self.shape_ZYX),
            "dtype": self.dtype.name,
            "labels_dtype": self.labels_dtype,
            "pixel_nm": list(self.pixel_nm),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dict(self.__dict__)
        return {**values, "dtype": self.dtype.name, "statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoredImage:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        z, y, x = values["shape_ZYX"]
        nm = values["pixel_nm"]
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        known |= {
            "shape_ZYX": (int(z), int(y), int(x)),
            "dtype": np.dtype(values["dtype"]),
            "pixel_nm": (nm[0], nm[1], nm[2]),
            "statistics": Statistics.from_dict(values["statistics"]),
            "notes": tuple(values.get("notes", ())),
            "copies": tuple(values.get("copies", ())),
        }
        return cls(**known)


@dataclass(frozen=True)
class Band:
    """What one shard holds: a block of whole rows."""

    key: str
    """Its place in the shard grid, `z/y/x`, as in the file's path."""
    z: slice
    y: slice


def chunk_shapes(shape: Shape, itemsize: int) -> tuple[Shape, Shape]:
    """(chunk, shard) for an array; the shard is a whole number of chunks and spans all columns."""
    depth, height, width = shape
    rows, columns = min(_CHUNK, height), min(_CHUNK, width)
    across = math.ceil(width / columns)
    row_of_chunks = rows * columns * across * itemsize
    fitting = max(1, min(_SHARD_BYTES // row_of_chunks, _SHARD_CHUNKS // across))
    down = min(math.ceil(height / rows), fitting)
    deep = min(depth, max(1, fitting // down)) if down * rows >= height else 1
    return (1, rows, columns), (deep, down * rows, across * columns)


def bands(shape: Shape, shard: Shape) -> Iterator[Band]:
    """The shards of an array in file order."""
    depth, height, _ = shape
    for i, z in enumerate(range(0, depth, shard[0])):
        for j, y in enumerate(range(0, height, shard[1])):
            yield Band(f"{i}/{j}/0", slice(z, min(z + shard[0], depth)), slice(y, min(y + shard[1], height)))


def image_attributes(name: str, pixel_nm: PixelSize) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes of an image group; an axis of unknown size has scale 1 and no unit."""
    axes = [
        {"name": axis, "type": "space"} | ({"unit": "nanometer"} if size is not None else {})
        for axis, size in zip("zyx", pixel_nm, strict=True)
    ]
    scale = [1.0 if size is None else float(size) for size in pixel_nm]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    return {"ome": {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": [level]}]}}


def label_attributes(name: str, pixel_nm: PixelSize) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes of a label group."""
    attributes = image_attributes(name, pixel_nm)
    attributes["ome"]["image-label"] = {"source": {"image": f"../../images/{name}"}}
    return attributes


def safe_name(wished: str, taken: Collection[str]) -> str:
    """An array name from any text, not equal to one of `taken` (given in lower case) without regard to case.

    Letters lose their accents, anything else becomes `_`; a name that changed its meaning, or clashes, gets a short
    hash of the original.
    """
    plain = unicodedata.normalize("NFKD", wished).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:_LONGEST_NAME]
    digest = sha256(wished.encode("utf-8", "surrogatepass")).hexdigest()
    if not name:
        name = f"image-{digest[:8]}"
    candidate, number = name, 2
    if len(plain) < len(wished) or len(wished) > _LONGEST_NAME:
        candidate = name = f"{name[: _LONGEST_NAME - 9]}-{digest[:8]}"
    while candidate.lower() in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
