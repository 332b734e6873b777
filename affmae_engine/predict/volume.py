"""OME-Zarr 0.5 arrays that are written block by block: labels, class probabilities, a copy of the image.

    NAME.zarr/               the image, with its pyramid 0, 1, 2, ...
    NAME.zarr/labels/NAME/   the labels, likewise, with colors and names of the classes
    NAME-probabilities.ome.zarr/

Every chunk ends in a CRC-32C: zstd alone does not notice most flipped bits. Every chunk is written, blank ones too: a
missing one is damage.

Axes: C classes (leading, for probabilities alone), Z Y X volume.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from affmae_engine import atomic
from affmae_engine.data import store_layout
from affmae_engine.data.readers import PixelSize
from affmae_engine.predict.grid import Block, Grid, Level, at_level
from affmae_engine.visualize import class_colours

ATTRIBUTE = "affmae_prediction"
"""Key of our own record in the attributes of an output; dataset stores have another one."""

ZARR_DIALECT = "OME-Zarr 0.5"
"""How reports name this format."""

ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Pyramid:
    """A group with an array for each level of `grid`.

    folder: the group. dtype: of the arrays. classes: length of the leading axis; None where there is none. depth:
    number of levels; None takes those of the grid.
    """

    folder: Path
    grid: Grid
    dtype: np.dtype[Any]
    classes: int | None = None
    depth: int | None = None

    @property
    def levels(self) -> list[Level]:
        """The arrays."""
        return self.grid.levels()[: self.depth]

    def create(self, attributes: dict[str, Any]) -> None:
        """Make the group with empty arrays. attributes: of the group, see the functions below."""
        zarr.create_group(self.folder, attributes=attributes, overwrite=False)
        lead = () if self.classes is None else (self.classes,)
        for k, level in enumerate(self.levels):
            zarr.create_array(
                self.folder / str(k),
                shape=(*lead, *level.shape),
                chunks=(*(1 for _ in lead), *level.chunk),
                shards=(*(1 for _ in lead), *level.shard),
                dtype=self.dtype,
                compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
                fill_value=0,
                dimension_names=("c", "z", "y", "x")[1 - len(lead) :],
                config={"write_empty_chunks": True},
            )

    @cached_property
    def arrays(self) -> list[Any]:
        """The arrays, open for reading and writing."""
        config = {"write_empty_chunks": True}
        return [zarr.open_array(self.folder / str(k), mode="r+", config=config) for k in range(len(self.levels))]

    def write(self, block: Block, values: np.ndarray) -> None:
        """Write a block at every level, and force its files to the device.

        Args:
            values: [Z, Y, X] of the block, with a leading axis for probabilities.

        Raises:
            ResourceError: the disk is full or failed.
        """
        files = list(self.files(block))
        for file in files:
            for leftover in file.parent.glob(f"{file.name}.*.partial"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        with atomic.translated_write_errors(self.folder):
            for k, array in enumerate(self.arrays):
                step = 1 << k
                first = [-start % step for start in (block.y[0], block.x[0])]
                y, x = at_level(block.y, k), at_level(block.x, k)
                if y[0] < y[1] and x[0] < x[1]:
                    array[..., slice(*block.z), slice(*y), slice(*x)] = values[..., first[0] :: step, first[1] :: step]
            written = [file for file in files if file.exists()]
            for file in written:
                atomic.fsync_file(file)
            folders = {folder for file in written for folder in file.parents if self.folder in folder.parents}
            for folder in sorted(folders, reverse=True):
                atomic.fsync_folder(folder)

    def files(self, block: Block) -> Iterator[Path]:
        """The files that hold a block; a level of few pixels may have none for it."""
        place = [str(number) for number in self.grid.place(block)]
        for k in range(len(self.levels)):
            for c in range(self.classes or 1):
                lead = [] if self.classes is None else [str(c)]
                yield self.folder.joinpath(str(k), "c", *lead, *place)


def create(folder: Path, made: Sequence[tuple[Pyramid, dict[str, Any]]], groups: Mapping[Path, dict[str, Any]]) -> None:
    """Make the arrays of a prediction unless they are there; processes that begin at once do not disturb each other.

    Args:
        folder: what all of them are in.
        made: arrays and the attributes of their groups.
        groups: attributes of further groups.

    Raises:
        ResourceError: the place cannot be written to.
    """
    tops = {path.relative_to(folder).parts[0] for path in (*(each.folder for each, _ in made), *groups)}
    if all((folder / top).exists() for top in tops):
        return
    with atomic.translated_write_errors(folder), tempfile.TemporaryDirectory(prefix="arrays.", dir=folder) as name:
        staging = Path(name)
        for each, attributes in made:
            replace(each, folder=staging / each.folder.relative_to(folder)).create(attributes)
        for path, attributes in groups.items():
            zarr.create_group(staging / path.relative_to(folder), attributes=attributes, overwrite=False)
        for path in sorted(staging.rglob("*"), reverse=True):
            if path.is_dir():
                atomic.fsync_folder(path)
            else:
                atomic.fsync_file(path)
        for top in tops:
            try:
                (staging / top).rename(folder / top)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                    raise
        atomic.fsync_folder(folder)


def multiscale(name: str, pixel_nm: PixelSize, levels: int, *, channels: bool = False) -> dict[str, Any]:
    """The `ome` attribute of an image of that many levels; an axis of unknown size has scale 1 and no unit.

    Level k has every 2^k-th pixel of the full resolution, so its scale is 2^k times as large and nothing is shifted.
    """
    ome: dict[str, Any] = store_layout.image_attributes(name, pixel_nm)["ome"]
    (image,) = ome["multiscales"]
    (full,) = image["datasets"]
    z, y, x = full["coordinateTransformations"][0]["scale"]
    lead = [1.0] if channels else []
    image["datasets"] = [
        {
            "path": str(k),
            "coordinateTransformations": [{"type": "scale", "scale": [*lead, z, y * 2**k, x * 2**k]}],
        }
        for k in range(levels)
    ]
    if channels:
        image["axes"].insert(0, {"name": "c", "type": "channel"})
    return ome


def labels_attributes(
    name: str,
    pixel_nm: PixelSize,
    levels: int,
    class_names: tuple[str, ...],
    record: dict[str, Any],
    *,
    image: bool = False,
) -> dict[str, Any]:
    """Of a label group: a color and a name for every class; class 0 is transparent. image: it has one at the root."""
    label: dict[str, Any] = {
        "version": "0.5",
        "colors": [
            {"label-value": value, "rgba": [*(int(part) for part in color), 255 if value else 0]}
            for value, color in enumerate(class_colours(len(class_names)))
        ],
        "properties": [{"label-value": value, "class": text} for value, text in enumerate(class_names)],
    }
    if image:
        label["source"] = {"image": "../../"}
    return {"ome": multiscale(name, pixel_nm, levels) | {"image-label": label}, ATTRIBUTE: record}


def image_attributes(
    name: str, pixel_nm: PixelSize, levels: int, window: tuple[float, float], record: dict[str, Any]
) -> dict[str, Any]:
    """Of the group at the root: the image, shown from window[0] to window[1]."""
    low, high = window
    span = {"min": low, "max": high, "start": low, "end": high}
    channel = {"label": name, "color": "FFFFFF", "active": True, "window": span}
    return {"ome": multiscale(name, pixel_nm, levels) | {"omero": {"channels": [channel]}}, ATTRIBUTE: record}


def probabilities_attributes(
    name: str, pixel_nm: PixelSize, levels: int, class_names: tuple[str, ...], record: dict[str, Any]
) -> dict[str, Any]:
    """Of class probabilities: a channel per class, shown from 0 to 255 (probability 1)."""
    span = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [
        {"label": text, "color": "FFFFFF", "active": index == 0, "window": span}
        for index, text in enumerate(class_names)
    ]
    ome = multiscale(name, pixel_nm, levels, channels=True) | {"omero": {"channels": channels}}
    return {"ome": ome, ATTRIBUTE: {**record, "probability": "value / 255"}}


def labels_group(path: Path) -> Path:
    """The group of label arrays in an OME-Zarr output; in those of earlier versions it is the root."""
    try:
        (name,) = json.loads((path / "labels" / "zarr.json").read_text("utf-8"))["attributes"]["ome"]["labels"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return path
    return path / "labels" / str(name)


def has_image(path: Path) -> bool:
    """Whether an OME-Zarr output holds a copy of the image beside the labels."""
    return labels_group(path) != path and (path / "0").is_dir()


def is_ours(folder: Path) -> bool:
    """Whether a folder is a volume that `affmae predict` wrote."""
    return _record(folder) is not None


def fingerprint_of(folder: Path) -> str | None:
    """The hash of what a volume was made from, as it says itself; None where something else stands there."""
    found = (_record(folder) or {}).get("fingerprint")
    return found if isinstance(found, str) else None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / "zarr.json").read_text("utf-8"))["attributes"][ATTRIBUTE]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
