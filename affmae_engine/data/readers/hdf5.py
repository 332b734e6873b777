"""HDF5: any dataset that can be an image, and the layouts of EMD (NCEM and Velox), ilastik, CREMI and BigDataViewer.

The library is neither small nor hardened, so this runs in a child process (`sandbox.py`). Links to other files are not
followed, and datasets whose values lie in other files are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from affmae_engine.data.readers.arrays import Array, array_source, guess_axes
from affmae_engine.data.readers.files import split_inner
from affmae_engine.data.readers.formats import missing
from affmae_engine.data.readers.grey import Colour
from affmae_engine.data.readers.hierarchy import axis_letter, voxel_sizes
from affmae_engine.data.readers.limits import refuse_inflated, refuse_large_piece
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.data.readers.units import nanometres

_DEEPEST, _MOST_OBJECTS = 12, 20_000
_LISTED = 12
_LABELS = re.compile(
    r"(?:^|[/_\-. ])(?:labels?|masks?|seg(?:mentations?)?|gt|ground_?truth|annotations?|neuron_ids|instances?|clefts)"
    r"(?:$|[/_\-. \d])",
    re.IGNORECASE,
)
_BIG_DATA_VIEWER = re.compile(r"t\d{5,}/s(\d+)/(\d+)/cells")
_VELOX = re.compile(r"Data/Image/[^/]+/Data")
_VELOX_TEXT = re.compile(r"/Data/[^/]+/[^/]+/Metadata")  # as bytes
_NCEM_UNIT = re.compile(r"[\[\]_]")


class _Dataset:
    """An open dataset that closes its file with it."""

    def __init__(self, file: Path, name: str, as_unsigned: bool) -> None:
        self._file = _h5py().File(file, "r", locking=False)
        self._dataset, self._as_unsigned = self._file[name], as_unsigned

    def __getitem__(self, selection: tuple[int | slice, ...]) -> np.ndarray:
        values: np.ndarray = self._dataset[selection]
        return values.view(np.uint16) if self._as_unsigned else values

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_hdf5(path: Path, options: ReadOptions) -> Found:
    """The dataset that `FILE:/NAME` names, or the one of a file that is an image, or a label map if one is wanted.

    Of EMD (Velox) and BigDataViewer files it is every image at full resolution.

    Raises:
        InputError: there is no such dataset, none that is an image, or several: they are listed.
    """
    h5py = _h5py()
    file, wanted = split_inner(path)
    with reading(file, wanted), h5py.File(file, "r", locking=False) as opened:
        found = {name: dataset for name, dataset in _datasets(opened, h5py) if _is_image(dataset)}
        names = _chosen(opened, wanted, found, options.labels, file)
        return [array_source(_describe(file, name, found[name]), options) for name in names], []


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise missing("h5py", "HDF5") from error
    return h5py


def _datasets(group: Any, h5py: Any) -> Iterator[tuple[str, Any]]:
    """All datasets below a group by name; each object once, and nothing of other files."""
    seen: set[int] = set()
    waiting = [("", group, 0)]
    while waiting:
        name, node, depth = waiting.pop()
        for child in node if depth < _DEEPEST else ():
            link = node.get(child, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                continue
            one = node.get(child)  # None for a link that leads nowhere
            address = h5py.h5o.get_info(one.id).addr if one is not None else -1
            if one is None or address in seen:
                continue
            seen.add(address)
            if len(seen) > _MOST_OBJECTS:
                raise Refused(f"it holds more than {_MOST_OBJECTS} objects", "name one dataset: FILE:/NAME")
            path = f"{name}/{child}".strip("/")
            if isinstance(one, h5py.Dataset):
                yield path, one
            elif isinstance(one, h5py.Group):
                waiting.append((path, one, depth + 1))


def _is_image(dataset: Any) -> bool:
    """Whether a dataset has real numbers and two to five axes, of which two are longer than one."""
    shape = dataset.shape or ()
    if not 2 <= len(shape) <= 5 or 0 in shape or dataset.dtype.kind not in "buif":
        return False
    return sum(n > 1 for n in shape) >= 2 and not _VELOX_TEXT.fullmatch(dataset.name)


def _chosen(opened: Any, wanted: str, found: Mapping[str, Any], labels: bool, file: Path) -> list[str]:
    """The names of the datasets to open. Raises Refused with a listing where that is for the user to say."""
    if wanted:
        below = [name for name in found if name == wanted or name.startswith(f"{wanted}/")]
        if len(below) == 1:
            return below
        if wanted in opened and hasattr(opened[wanted], "shape"):
            raise Refused("it is no image: its values are not real numbers, or it has fewer than two axes")
        if not below:
            raise Refused("there is no image of that name in it", f"it holds {_listing(found)}" if found else "")
        raise Refused(f"it holds {len(below)} images", f"name one: {_listing({n: found[n] for n in below}, file)}")
    if not found:
        raise Refused("it holds no dataset that could be an image")
    first = [name for name in found if (m := _BIG_DATA_VIEWER.fullmatch(name)) and m[2] == "0"]
    first = first or [name for name in found if _VELOX.fullmatch(name)]
    if first:
        return sorted(first)
    maps = [name for name in found if _LABELS.search(name)]
    images = [name for name in found if name not in maps]
    best = (maps or images) if labels else (images or maps)
    if len(best) > 1:
        # Tables and coordinates beside an image are no candidates.
        large = [name for name in best if sorted(found[name].shape)[-2] >= 16]
        best = large or best
    if len(best) == 1:
        if not labels and best[0] in maps:
            raise Refused("it holds label maps only, no image", f"if {best[0]} is an image, name it: {file}:/{best[0]}")
        return best
    raise Refused(
        f"it holds {len(best)} datasets that could be the image",
        f"name one: {_listing({n: found[n] for n in best}, file)}",
    )


def _listing(found: Mapping[str, Any], file: Path | None = None) -> str:
    """Datasets in words, with type and shape; those of a file as they have to be named."""
    before = f"{file}:/" if file is not None else "/"
    lines = [
        f"{before}{name} ({dataset.dtype.name}, {' x '.join(map(str, dataset.shape))})"
        for name, dataset in sorted(found.items())[:_LISTED]
    ]
    more = len(found) - len(lines)
    return ", ".join(lines) + (f" and {more} more" if more > 0 else "")


def _describe(file: Path, name: str, dataset: Any) -> Array:
    if dataset.external or dataset.is_virtual:
        raise Refused("its values lie in other files, which are not opened", "copy them into one file")
    dtype, shape = dataset.dtype, tuple(int(n) for n in dataset.shape)
    chunk = math.prod(dataset.chunks) * dtype.itemsize if dataset.chunks else 0
    refuse_large_piece(chunk, "a chunk of it", "save it again with smaller chunks")
    stored = file.stat().st_size
    refuse_inflated(math.prod(shape) * dtype.itemsize, stored, compressed=bool(chunk))
    notes: tuple[str, ...] = ()
    as_unsigned = False
    kind, axes, sizes = "HDF5", "", {}
    if match := _BIG_DATA_VIEWER.fullmatch(name):
        kind, axes, sizes = "BigDataViewer HDF5", "ZYX", _big_data_viewer(file, int(match[1]))
        if dtype == np.int16:  # Java has no unsigned numbers: they are stored as signed ones
            as_unsigned, dtype, notes = True, np.dtype(np.uint16), ("numbers read as unsigned",)
    elif _VELOX.fullmatch(name):
        kind, axes, sizes = "EMD (Velox)", "YXT"[: len(shape)], _velox(dataset)
    elif dataset.parent.attrs.get("emd_group_type") is not None:
        kind = "EMD"
        axes, sizes = _ncem(dataset)
    else:
        axes, sizes = _named(dataset)
    axes = axes if len(axes) == len(shape) and axes.count("Y") == axes.count("X") == 1 else ""
    written, axes = bool(axes), axes or guess_axes(shape)
    sizes = sizes or voxel_sizes(_plain(dataset.attrs), axes)
    colour: Colour = "rgb" if "S" in axes else "grey"
    return Array(
        path=file,
        open=partial(_Dataset, file, name, as_unsigned),
        shape=shape,
        dtype=dtype,
        axes=axes,
        format=kind,
        pixel_nm=sizes,
        series=name,
        notes=notes,
        axes_from="file" if written else "guess",
        piece_bytes=chunk,
        samples=colour,
        isolated=True,
    )


def _named(dataset: Any) -> tuple[str, dict[str, float | None]]:
    """Axes and sizes by ilastik's `axistags`, or by the labels of HDF5's dimensions."""
    tags = _plain(dataset.attrs).get("axistags")
    if isinstance(tags, str):
        try:
            entries = json.loads(tags)["axes"]
            axes = "".join(axis_letter(str(entry["key"])) for entry in entries)
            sizes = {
                axis_letter(str(entry["key"])): nanometres(
                    entry.get("resolution"), entry.get("unit") or entry.get("description")
                )
                for entry in entries
            }
        except (ValueError, KeyError, TypeError, RecursionError):
            return "", {}
        return axes, sizes if any(sizes.values()) else {}
    labels = [dimension.label for dimension in dataset.dims]
    return "".join(axis_letter(label) for label in labels) if all(labels) else "", {}


def _ncem(dataset: Any) -> tuple[str, dict[str, float | None]]:
    """EMD of the NCEM: beside `data`, one dataset per axis with the coordinates, `dim1`, `dim2` and so on."""
    letters, steps = [], []
    for number in range(1, len(dataset.shape) + 1):
        dimension = dataset.parent.get(f"dim{number}")
        attributes = _plain(dimension.attrs) if dimension is not None else {}
        letters.append(axis_letter(str(attributes.get("name", ""))))
        unit = _NCEM_UNIT.sub("", str(attributes.get("units", "")))
        values = dimension[:2] if dimension is not None and dimension.shape and dimension.shape[0] > 1 else (0, 0)
        steps.append(nanometres(abs(float(values[1]) - float(values[0])), unit))
    axes = "".join(letters)
    if axes.count("Y") != 1 or axes.count("X") != 1:
        axes = guess_axes(dataset.shape)
    return axes, dict(zip(axes, steps, strict=False))


def _velox(dataset: Any) -> dict[str, float | None]:
    """EMD of Velox: JSON per frame, as bytes in a column of `Metadata`."""
    try:
        text = dataset.parent["Metadata"][:, 0].tobytes().rstrip(b"\0").decode()
        result = json.loads(text)["BinaryResult"]
        size = result["PixelSize"]
        return {
            "Y": nanometres(size["height"], result["PixelUnitY"]),
            "X": nanometres(size["width"], result["PixelUnitX"]),
        }
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return {}


def _big_data_viewer(file: Path, setup: int) -> dict[str, float | None]:
    """The voxel size of a view setup, from the XML of the same name beside the file."""
    beside = file.with_suffix(".xml")
    try:
        text = beside.read_text("utf-8") if beside.stat().st_size < 16 << 20 else ""
        if not text or "<!ENTITY" in text:
            return {}
        for one in ElementTree.fromstring(text).iter("ViewSetup"):
            size = one.find("voxelSize")
            if size is not None and int(one.findtext("id", "-1")) == setup:
                values, unit = size.findtext("size", "").split(), size.findtext("unit")
                return {axis: nanometres(value, unit) for axis, value in zip("XYZ", values, strict=True)}
    except (OSError, ValueError, ElementTree.ParseError):
        pass
    return {}


def _plain(attributes: Any) -> dict[str, Any]:
    """Attributes with texts as str; those that cannot be read are left out."""
    found = {}
    for name in attributes:
        try:
            value = attributes[name]
        except (OSError, TypeError, ValueError):
            continue
        found[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return found
