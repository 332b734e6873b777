"""Label volumes and maps as they are opened for this package: one volume per path, with its classes and voxel size.

Axes: Z Y X.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from affmae_engine.data.readers import PixelSize, Source, open_sources
from affmae_engine.data.readers.files import find_files
from affmae_engine.data.readers.source import reading
from affmae_engine.data.volumes import Stacked
from affmae_engine.errors import InputError
from affmae_engine.objects.blocks import Shape


@dataclass(frozen=True)
class Annotations:
    """What a file that affmae wrote says about its values.

    class_names: names of the classes 0, 1, ... class_of: class index by object id. channels: names of the channels of a
    map; distance_cap: what the value 255 of its channel "distance" stands for, in pixels.
    """

    class_names: tuple[str, ...] = ()
    class_of: dict[int, int] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    distance_cap: float | None = None


def open_labels(path: Path) -> Source:
    """The one label volume at `path`: a file, a Zarr folder, or a folder of sections.

    Raises:
        InputError: nothing, or several volumes are there; or it holds no label numbers.
    """
    return _volume(path, labels=True)


def open_image(path: Path) -> Source:
    """The one image or stack at `path`.

    Raises:
        InputError: nothing, or several images are there.
    """
    return _volume(path)


def open_channel(path: Path, channel: int | None) -> Source:
    """One channel of a volume of maps (class probabilities, boundary, distance), as its file's own values.

    Raises:
        InputError: it cannot be read, or has no such channel.
    """
    return _volume(path, channel=channel)


def require_same_shape(first: Source, other: Source) -> None:
    """Raises InputError when two volumes do not cover the same voxels."""
    if first.info.shape_ZYX != other.info.shape_ZYX:
        raise InputError(
            f"{other.info.path} has {_by(other.info.shape_ZYX)} voxels and {first.info.path} has "
            f"{_by(first.info.shape_ZYX)} (z, y, x)",
            "give volumes of the same shape",
        )


def voxel_size(source: Source, override: PixelSize | None = None) -> tuple[float, float, float] | None:
    """Voxel size z, y, x in nm; None when nothing is known. A single section needs no z; it is then 1.

    Args:
        override: takes the place of what the file says, axis by axis.

    Raises:
        InputError: only some axes are known.
    """
    known = source.info.pixel_nm
    sizes = [b if b is not None else a for a, b in zip(known, override or (None, None, None), strict=True)]
    if source.info.shape_ZYX[0] == 1 and sizes[1] is not None:
        sizes[0] = sizes[0] or 1.0
    if all(size is None for size in sizes):
        return None
    if sizes[0] is None or sizes[1] is None or sizes[2] is None:
        raise InputError(
            f"{source.info.path} does not give the voxel size of every axis (z, y, x: "
            f"{', '.join('unknown' if s is None else f'{s:g} nm' for s in sizes)})",
            "give all three with --pixel-size z,y,x",
        )
    return sizes[0], sizes[1], sizes[2]


def read_annotations(path: Path) -> Annotations:
    """What the file says about its values; empty where another program wrote it.

    Raises:
        InputError: it cannot be read.
    """
    file = find_files([path])[0]
    record = _zarr_attributes(file) if file.is_dir() else _tiff_record(file)
    own = record.get("affmae_prediction", record.get("affmae_objects", record.get("affmae", record)))
    ome = record.get("ome", {})
    names = own.get("class_names", []) if isinstance(own, dict) else []
    classes = own.get("object_classes", []) if isinstance(own, dict) else []
    try:
        channels = tuple(str(c["label"]) for c in ome.get("omero", {}).get("channels", []))
        cap = own.get("distance_cap") if isinstance(own, dict) else None
        return Annotations(
            class_names=tuple(str(name) for name in names),
            class_of={number: int(index) for number, index in enumerate(classes, 1)},
            channels=channels,
            distance_cap=None if cap is None else float(cap),
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        return Annotations()


def _zarr_attributes(folder: Path) -> dict[str, Any]:
    try:
        attributes = json.loads((folder / "zarr.json").read_text("utf-8")).get("attributes", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _tiff_record(path: Path) -> dict[str, Any]:
    """Our record in a TIFF's ImageJ or OME metadata."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return {}
    with reading(path), tifffile.TiffFile(path) as file:
        texts = [str((file.imagej_metadata or {}).get("Info", ""))]
        if file.ome_metadata and "<!ENTITY" not in file.ome_metadata:
            described = tifffile.xml2dict(file.ome_metadata).get("OME", {}).get("Image", {})
            texts.append(str(described.get("Description", "")) if isinstance(described, dict) else "")
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _volume(path: Path, *, channel: int | None = None, labels: bool = False) -> Source:
    """The volume of a file, or of a folder whose files are its sections."""
    files = find_files([path])
    parts = [open_sources(file, channel=channel, labels=labels) for file in files]
    for file, sources in zip(files, parts, strict=True):
        if len(sources) != 1:
            names = ", ".join(source.info.series for source in sources[:4])
            raise InputError(f"{file} holds {len(sources)} images ({names}), and one is needed", "save that one apart")
    volumes = [sources[0] for sources in parts]
    if len(volumes) == 1:
        return volumes[0]
    if len({v.info.shape_ZYX for v in volumes}) > 1 or volumes[0].info.shape_ZYX[0] != 1:
        raise InputError(
            f"{path} holds {len(files)} files that are not the sections of one stack", "name one file or Zarr folder"
        )
    return Stacked(volumes)


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def values_dtype(largest: int) -> np.dtype[Any]:
    """uint32 for ids up to 4294967295, else uint64: what Fiji and napari read as labels."""
    return np.dtype(np.uint32 if largest <= np.iinfo(np.uint32).max else np.uint64)
