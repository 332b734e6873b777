"""The metadata of a stranger's Zarr hierarchy, read from its JSON files and checked before the Zarr library sees it.

Zarr 2 and 3, plain or OME-Zarr 0.1 to 0.5. Only real-number arrays and a closed list of codecs are allowed (object
arrays bring pickle, unknown codecs bring plug-ins), and nothing outside the root folder is followed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.hierarchy import Hierarchy, LocalHierarchy, axis_letter, first_levels, voxel_sizes
from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.source import Refused
from affmae_engine.data.readers.units import nanometres

_MARKERS = ("zarr.json", ".zarray", ".zgroup")
_CODECS = {
    "bytes", "transpose", "sharding_indexed", "zstd", "gzip", "crc32c", "blosc",
    "zlib", "bz2", "lz4", "lzma", "delta", "fletcher32", "shuffle", "crc32", "adler32",
}  # fmt: skip
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|[<>|]?(b1|[iu][1248]|f[248])")
_DEEPEST = 6


@dataclass(frozen=True)
class ArrayFound:
    """One image array of a hierarchy; `axes` is empty where it does not name them."""

    key: str
    metadata: Mapping[str, Any]
    axes: str = ""
    pixel_nm: Mapping[str, float | None] = field(default_factory=dict)
    format: str = "Zarr"


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a node of a Zarr hierarchy."""
    return any((folder / marker).is_file() for marker in _MARKERS)


def find_arrays(tree: Hierarchy, *, labels: bool) -> Iterator[ArrayFound | tuple[str, Refused]]:
    """All image arrays of a hierarchy (full resolution only), and the keys of what was refused with the reason.

    Args:
        labels: whether label maps are wanted; otherwise groups that say they are one are refused.
    """
    yield from _walk(tree, "", 0, set(), labels)


def check_array(folder: Path) -> None:
    """Refuse arrays of types and codecs that are not on the list, or with enormous chunks, by their metadata alone."""
    check_metadata(_node(LocalHierarchy(folder), ""))


def check_metadata(metadata: Mapping[str, Any]) -> int:
    """Like `check_array`, of metadata that were read; returns the bytes of what is decoded as a whole."""
    kind = metadata.get("data_type", metadata.get("dtype"))
    if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
        raise Refused(f"its values are of type {str(kind)[:60]}, not real numbers")
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise Refused("its metadata has no valid shape")
    if metadata["zarr_format"] == 2:
        codecs = [c for c in [metadata.get("compressor"), *(metadata.get("filters") or [])] if c]
        names = [str(codec.get("id")) for codec in codecs]
        for codec in codecs:
            for key in ("dtype", "astype"):
                if key in codec and not _NUMBERS.fullmatch(str(codec[key])):
                    raise Refused(f"its codec {names[codecs.index(codec)][:40]} works on {str(codec[key])[:40]}")
        chunk = metadata.get("chunks")
    else:
        grid = metadata.get("chunk_grid", {})
        if grid.get("name") != "regular" or metadata.get("storage_transformers"):
            raise Refused("it uses a chunk grid or storage transformer that is not supported")
        chunk, names = _innermost(metadata.get("codecs", []), grid["configuration"]["chunk_shape"])
    unknown = [name for name in names if name.removeprefix("numcodecs.") not in _CODECS]
    if unknown:
        raise Refused(f"its codec {unknown[0][:40]} is not supported", f"supported: {', '.join(sorted(_CODECS))}")
    if not isinstance(chunk, list) or not all(isinstance(n, int) and n > 0 for n in chunk):
        raise Refused("its metadata has no valid chunk shape")
    nbytes = math.prod(chunk) * np.dtype(kind).itemsize
    refuse_large_piece(nbytes, "a chunk of it", "save it again with smaller chunks")
    return nbytes


def _innermost(codecs: list[dict[str, Any]], chunk: list[int]) -> tuple[list[int], list[str]]:
    names = []
    for codec in codecs:
        names.append(str(codec.get("name")))
        if names[-1] == "sharding_indexed":
            inner = codec["configuration"]
            names += [str(c.get("name")) for c in inner.get("index_codecs", [])]
            chunk, deeper = _innermost(inner["codecs"], inner["chunk_shape"])
            names += deeper
    return chunk, names


def _walk(
    tree: Hierarchy, key: str, depth: int, seen: set[str], labels: bool
) -> Iterator[ArrayFound | tuple[str, Refused]]:
    try:
        if tree.visited(key, seen):  # links back up would multiply with every level
            return
        metadata = _node(tree, key)
        if metadata.get("node_type") == "array":
            yield _plain_array(key, metadata)
            return
        ome = _ome(metadata["attributes"])
        if "image-label" in ome and not labels:
            raise Refused("it is a label map (image-label), not an image", "finetune and predict take it with --labels")
        images = ome.get("multiscales")
        if isinstance(images, list) and images:
            for image in images:
                yield _multiscale(tree, key, image, "OME-Zarr")
            return
        if depth < _DEEPEST:
            for child in first_levels(tree, key, lambda one: _node(tree, one).get("shape")):
                yield from _walk(tree, child, depth + 1, seen, labels)
    except Refused as refusal:
        yield key, refusal
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield key, Refused(f"its metadata is damaged ({type(error).__name__}: {str(error)[:80]})")


def _node(tree: Hierarchy, key: str) -> dict[str, Any]:
    """Metadata of one node with `zarr_format`, `node_type` and `attributes` filled in, for Zarr 2 as well."""
    new = tree.json(key, "zarr.json")
    if new is not None:
        return {"zarr_format": 3, **new, "attributes": new.get("attributes") or {}}
    attributes = tree.json(key, ".zattrs") or {}
    old = tree.json(key, ".zarray")
    if old is not None:
        return {**old, "zarr_format": 2, "node_type": "array", "attributes": attributes}
    return {"zarr_format": 2, "node_type": "group", "attributes": attributes}


def _plain_array(key: str, metadata: dict[str, Any]) -> ArrayFound:
    rank = len(metadata.get("shape") or [])
    names = metadata.get("dimension_names") or metadata["attributes"].get("_ARRAY_DIMENSIONS")
    axes = ""
    if isinstance(names, list) and len(names) == rank and all(isinstance(n, str) for n in names):
        axes = "".join(axis_letter(name) for name in names)
        if axes.count("Y") != 1 or axes.count("X") != 1:
            axes = ""
    return ArrayFound(key, metadata, axes, voxel_sizes(metadata["attributes"], axes or "ZYX"[-rank:]))


def _multiscale(tree: Hierarchy, key: str, image: dict[str, Any], kind: str) -> ArrayFound:
    level = image["datasets"][0]
    path = str(level["path"])
    target = f"{key}/{path}".strip("/")
    outside = path.startswith("/") or ".." in Path(path).parts
    metadata = {} if outside else _node(tree, target)
    if metadata.get("node_type") != "array":
        raise Refused(f"its full-resolution array {path[:60]} is missing or outside its folder")
    axes = image.get("axes")
    if not axes:  # OME-Zarr 0.1 and 0.2 fix the order
        return ArrayFound(target, metadata, "TCZYX"[-len(metadata["shape"]) :], format=kind)
    named = [axis if isinstance(axis, dict) else {"name": axis} for axis in axes]
    letters = "".join(axis_letter(str(axis["name"])) for axis in named)
    if len(letters) != len(metadata["shape"]) or letters.count("Y") != 1 or letters.count("X") != 1:
        raise Refused(f"its axes {letters} do not fit its array of {len(metadata['shape'])} axes")
    scale = [1.0] * len(named)
    for step in [*level.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if step.get("type") == "scale" and isinstance(step.get("scale"), list):
            scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
    sizes = {a: nanometres(s, axis.get("unit")) for a, s, axis in zip(letters, scale, named, strict=True)}
    return ArrayFound(target, metadata, letters, sizes, kind)


def _ome(attributes: dict[str, Any]) -> dict[str, Any]:
    ome = attributes.get("ome")
    return ome if isinstance(ome, dict) else attributes
