"""What Zarr, N5 and HDF5 hierarchies have in common: JSON beside arrays, pyramids, names of axes, voxel sizes."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from affmae_engine.data.readers.source import Refused
from affmae_engine.data.readers.units import nanometres

_LARGEST_JSON = 16 << 20
_LETTERS = {"channel": "C", "channels": "C", "time": "T", "depth": "Z", "height": "Y", "width": "X"}


class Hierarchy(Protocol):
    """Folders with JSON files in them; keys are paths below the root, "" is the root."""

    def json(self, key: str, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of a folder; None where there is no such file.

        Raises:
            Refused: it is too large, or no JSON object.
        """

    def children(self, key: str) -> list[str]:
        """Keys of the folders in a folder, sorted; empty where they cannot be listed."""

    def visited(self, key: str, seen: set[str]) -> bool:
        """Whether a folder is one of `seen`, to which it is added. Raises Refused when it lies outside the root."""


class LocalHierarchy:
    """A hierarchy on disk; what links out of its root is refused."""

    def __init__(self, root: Path) -> None:
        self._root, self._real = root, os.path.realpath(root)

    def json(self, key: str, name: str) -> dict[str, Any] | None:
        """See `Hierarchy`."""
        path = self._root / key / name
        if not path.is_file():
            return None
        self._inside(str(path))
        if path.stat().st_size > _LARGEST_JSON:
            raise Refused(f"its {name} is larger than 16 MiB")
        return parse(path.read_bytes(), name)

    def children(self, key: str) -> list[str]:
        """See `Hierarchy`."""
        folder = self._root / key
        names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
        return [f"{key}/{name}".strip("/") for name in names]

    def visited(self, key: str, seen: set[str]) -> bool:
        """See `Hierarchy`."""
        real = self._inside(str(self._root / key))
        if real in seen:
            return True
        seen.add(real)
        return False

    def _inside(self, path: str) -> str:
        real = os.path.realpath(path)
        if real != self._real and not real.startswith(self._real + os.sep):
            raise Refused("a link leads out of its folder", "only data inside the folder is read")
        return real


def parse(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises Refused when it is none."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"its {name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise Refused(f"its {name} does not hold an object")
    return value


def first_levels(tree: Hierarchy, key: str, shape_of: Callable[[str], Any]) -> list[str]:
    """Folders in a folder; of a bare pyramid (0, 1, 2 or s0, s1, s2 of shrinking size) only the first."""
    nodes = tree.children(key)
    levels = [node for node in nodes if re.fullmatch(r"s?\d+", node.rsplit("/", 1)[-1])]
    levels.sort(key=lambda node: int(node.rsplit("/", 1)[-1].lstrip("s")))
    shapes = [shape_of(level) for level in levels]
    shrinking = all(
        a and b and len(a) == len(b) and a != b and all(q <= p for p, q in zip(a, b, strict=True))
        for a, b in itertools.pairwise(shapes)
    )
    if len(levels) > 1 and len(levels) == len(nodes) and shrinking:
        return levels[:1]
    return nodes


def axis_letter(name: str) -> str:
    """The letter of an axis by its name; `I` for names that say nothing about it."""
    if len(name) == 1 and name.lower() in "tczyx":
        return name.upper()
    return _LETTERS.get(name.lower(), "I")


def voxel_sizes(attributes: Mapping[str, Any], axes: str) -> dict[str, float | None]:
    """Nanometers per voxel by axis letter, from the attributes that programs write beside arrays.

    `element_size_um` (Fiji, z y x), `voxel_size` and `resolution` (CREMI, funlib; in the order of the axes, in `units`
    or nanometers), `pixelResolution` (N5, in the order of its axes). Whatever is wrong with them counts as silence.
    """
    spatial = [letter for letter in axes if letter in "ZYX"]
    element = _numbers(attributes.get("element_size_um"))
    if element:
        return {a: nanometres(value, "um") for a, value in zip("ZYX"[-len(element) :], element, strict=False)}
    named = attributes.get("pixelResolution")
    if isinstance(named, Mapping):
        sizes = _numbers(named.get("dimensions"))
        return {a: nanometres(v, named.get("unit", "um")) for a, v in zip(spatial, sizes, strict=False)}
    for name, default in (("pixelResolution", "um"), ("voxel_size", "nm"), ("resolution", "nm")):
        sizes = _numbers(attributes.get(name))
        if not sizes:
            continue
        letters = list(axes) if len(sizes) == len(axes) else spatial
        if len(sizes) != len(letters):
            continue
        units = attributes.get("units", attributes.get("unit", default))
        units = list(units) if isinstance(units, (list, tuple)) else [units] * len(sizes)
        if len(units) == len(sizes):
            return {
                a: nanometres(v, u) for a, v, u in zip(letters, sizes, units, strict=True) if a in "ZYX"
            }  # fmt: skip
    return {}


def _numbers(value: Any) -> list[float]:
    try:
        return [float(one) for one in value]
    except (TypeError, ValueError):
        return []
