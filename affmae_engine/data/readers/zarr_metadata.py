"""The metadata of a stranger's Zarr hierarchy, read from its JSON files and checked before the Zarr library sees it.

Zarr 2 and 3, plain or OME-Zarr 0.4/0.5. Only real-number arrays and a closed list of codecs are allowed (object
arrays bring pickle, unknown codecs bring plug-ins), and nothing outside the root folder is followed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.source import UNKNOWN_SIZE, PixelSize, Refused
from affmae_engine.data.readers.units import nanometres

_MARKERS = ("zarr.json", ".zarray", ".zgroup")
_CODECS = {
    "bytes", "transpose", "sharding_indexed", "zstd", "gzip", "crc32c", "blosc",
    "zlib", "bz2", "lz4", "lzma", "delta", "fletcher32", "shuffle", "crc32", "adler32",
}  # fmt: skip
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|[<>|]?(b1|[iu][1248]|f[248])")
_LARGEST_JSON = 16 << 20
_DEEPEST = 6
_AXES_BY_RANK = {2: "YX", 3: "ZYX", 4: "CZYX", 5: "TCZYX"}


@dataclass(frozen=True)
class ArrayFound:
    """One image array of a hierarchy."""

    folder: Path
    axes: str
    pixel_nm: PixelSize = UNKNOWN_SIZE
    format: str = "Zarr"
    notes: tuple[str, ...] = ()


class OneDimensional(Refused):
    """An array that cannot be an image, as coordinates and tables beside images are."""


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a node of a Zarr hierarchy."""
    return any((folder / marker).is_file() for marker in _MARKERS)


def find_arrays(root: Path, *, labels: bool) -> Iterator[ArrayFound | tuple[Path, Refused]]:
    """All image arrays under `root` (full resolution only), and the nodes that were refused with the reason.

    Args:
        labels: whether label maps are wanted; otherwise groups that say they are one are refused.
    """
    yield from _walk(root, root.resolve(), 0, set(), labels)


def check_array(folder: Path) -> None:
    """Refuse arrays of types and codecs that are not on the list, or with enormous chunks, by their metadata alone."""
    metadata = _node(folder)
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
    folder: Path, root: Path, depth: int, seen: set[Path], labels: bool
) -> Iterator[ArrayFound | tuple[Path, Refused]]:
    try:
        resolved = folder.resolve()
        if resolved in seen:  # links back up would multiply with every level
            return
        seen.add(resolved)
        if resolved != root and root not in resolved.parents:
            raise Refused("a link leads out of its folder", "only data inside the Zarr folder is read")
        metadata = _node(folder)
        if metadata.get("node_type") == "array":
            yield _plain_array(folder, metadata)
            return
        ome = _ome(metadata.get("attributes", {}))
        if "image-label" in ome and not labels:
            raise Refused("it is a label map (image-label), not an image", "finetune and predict take it with --labels")
        images = ome.get("multiscales")
        if isinstance(images, list) and images:
            for image in images:
                yield _multiscale(folder, image, "OME-Zarr")
            return
        if depth < _DEEPEST:
            for child in _children(folder):
                yield from _walk(child, root, depth + 1, seen, labels)
    except Refused as refusal:
        yield folder, refusal
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield folder, Refused(f"its metadata is damaged ({type(error).__name__}: {str(error)[:80]})")


def _node(folder: Path) -> dict[str, Any]:
    """Metadata of one node with `zarr_format`, `node_type` and `attributes` filled in for Zarr 2 as well."""
    if (folder / "zarr.json").is_file():
        return {"zarr_format": 3, **_json(folder / "zarr.json")}
    attributes = _json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
    if (folder / ".zarray").is_file():
        return {**_json(folder / ".zarray"), "zarr_format": 2, "node_type": "array", "attributes": attributes}
    return {"zarr_format": 2, "node_type": "group", "attributes": attributes}


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_JSON:
        raise Refused(f"its {path.name} is larger than 16 MiB")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"its {path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise Refused(f"its {path.name} does not hold an object")
    return value


def _children(folder: Path) -> list[Path]:
    """Sub-nodes; of a bare pyramid (0, 1, 2 or s0, s1, s2 of shrinking size) only the first."""
    nodes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    levels = sorted(
        (child for child in nodes if re.fullmatch(r"s?\d+", child.name)), key=lambda c: int(c.name.lstrip("s"))
    )
    shapes = [_node(level).get("shape") for level in levels]
    shrinking = all(
        a and b and len(a) == len(b) and a != b and all(q <= p for p, q in zip(a, b, strict=True))
        for a, b in itertools.pairwise(shapes)
    )
    if len(levels) > 1 and len(levels) == len(nodes) and shrinking:
        return levels[:1]
    return nodes


def _plain_array(folder: Path, metadata: dict[str, Any]) -> ArrayFound:
    shape = metadata.get("shape") or []
    if len(shape) < 2:
        raise OneDimensional("it is one-dimensional: not an image")
    if len(shape) > 5:
        raise Refused(f"it has {len(shape)} axes; images and stacks have 2 to 5")
    names = metadata.get("dimension_names") or metadata["attributes"].get("_ARRAY_DIMENSIONS")
    if isinstance(names, list) and len(names) == len(shape) and all(isinstance(n, str) for n in names):
        axes = "".join(_letter(name) for name in names)
        if axes.count("Y") == axes.count("X") == 1:
            return ArrayFound(folder, axes)
    axes = _AXES_BY_RANK[len(shape)]
    if len(shape) == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= 16:
        axes = "YXS"
    notes = () if len(shape) == 2 else (f"axes not named: taken as {axes}",)
    return ArrayFound(folder, axes, notes=notes)


def _multiscale(folder: Path, image: dict[str, Any], kind: str) -> ArrayFound:
    level = image["datasets"][0]
    path = str(level["path"])
    target = folder / path
    if path.startswith("/") or ".." in Path(path).parts or not is_zarr(target):
        raise Refused(f"its full-resolution array {path[:60]} is missing or outside its folder")
    metadata = _node(target)
    axes = image.get("axes")
    if not axes:  # OME-Zarr 0.1 and 0.2 fix the order
        return ArrayFound(target, _AXES_BY_RANK[len(metadata["shape"])], format=kind)
    named = [axis if isinstance(axis, dict) else {"name": axis} for axis in axes]
    letters = "".join(_letter(str(axis["name"])) for axis in named)
    if len(letters) != len(metadata["shape"]) or letters.count("Y") != 1 or letters.count("X") != 1:
        raise Refused(f"its axes {letters} do not fit its array of {len(metadata['shape'])} axes")
    scale = [1.0] * len(named)
    for step in [*level.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if step.get("type") == "scale" and isinstance(step.get("scale"), list):
            scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
    sizes = {a: nanometres(s, axis.get("unit")) for a, s, axis in zip(letters, scale, named, strict=True)}
    return ArrayFound(target, letters, (sizes.get("Z"), sizes.get("Y"), sizes.get("X")), kind)


def _ome(attributes: dict[str, Any]) -> dict[str, Any]:
    ome = attributes.get("ome")
    return ome if isinstance(ome, dict) else attributes


def _letter(name: str) -> str:
    known = {"channel": "C", "channels": "C", "time": "T", "depth": "Z", "height": "Y", "width": "X"}
    return known.get(name.lower(), name[:1].upper() if name[:1].lower() in "tczyx" and len(name) == 1 else "I")
