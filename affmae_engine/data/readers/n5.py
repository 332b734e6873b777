"""N5 containers and datasets. Axes are stored in reverse, so `dimensions` is (x, y, z, channel, time).

A missing block holds zeros. Voxel sizes come from the attributes of N5 viewer (`pixelResolution`,
`downsamplingFactors`), COSEM (`transform`) and others (`resolution`), of the dataset or of the groups above it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.arrays import Array, OneDimensional, array_source, short_name
from affmae_engine.data.readers.files import is_remote, split_inner
from affmae_engine.data.readers.hierarchy import Hierarchy, LocalHierarchy, axis_letter, first_levels, voxel_sizes
from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.remote import library, opener
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, Source, reading
from affmae_engine.data.readers.units import nanometres
from affmae_engine.errors import InputError

_DEEPEST = 6
_NUMBERS = re.compile(r"u?int(8|16|32|64)|float(32|64)")


def open_n5(
    path: Path, options: ReadOptions, tree: Hierarchy | None = None
) -> Found:  # fmt: skip
    """Every dataset of a container at full resolution, and why others were refused.

    Args:
        tree: its metadata, where it was opened already (remote).

    Raises:
        InputError: nothing in it can be read, or tensorstore is not installed.
    """
    library("N5")
    file, inner = split_inner(path)
    root = file / inner if inner else file
    tree = tree or LocalHierarchy(root)
    sources: list[Source] = []
    refused: list[InputError] = []
    with reading(root):
        found = list(_datasets(tree, "", (), set()))
    for key, attributes, above in found:
        series = key if len(found) > 1 else ""
        try:
            with reading(root, series):
                sources.append(array_source(_describe(root, key, attributes, above, series), options))
        except InputError as error:
            if not isinstance(error.__cause__, OneDimensional):
                refused.append(error)
    if not sources:
        hint = "name one dataset in it" if is_remote(root) else ""
        raise refused[0] if refused else InputError(f"cannot read {root}: it holds no datasets", hint)
    return sources, refused


Attributes = Mapping[str, Any]


def _datasets(
    tree: Hierarchy, key: str, above: tuple[Attributes, ...], seen: set[str]
) -> Iterator[tuple[str, Attributes, tuple[Attributes, ...]]]:
    """Keys of datasets with their attributes and those of the groups above them, nearest first."""
    if tree.visited(key, seen):
        return
    attributes = tree.json(key, "attributes.json") or {}
    if "dimensions" in attributes and "dataType" in attributes:
        yield key, attributes, above
    elif len(above) < _DEEPEST:
        for child in first_levels(
            tree, key, lambda one: (tree.json(one, "attributes.json") or {}).get("dimensions")
        ):  # fmt: skip
            yield from _datasets(tree, child, (attributes, *above), seen)


def _describe(root: Path, key: str, attributes: Attributes, above: tuple[Attributes, ...], series: str) -> Array:
    shape = attributes["dimensions"]
    if not _NUMBERS.fullmatch(str(attributes["dataType"])):
        raise Refused(f"its values are of type {str(attributes['dataType'])[:60]}, not real numbers")
    if len(shape) < 2:
        raise OneDimensional("it is one-dimensional: not an image")
    if not 2 <= len(shape) <= 5 or not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in shape):
        raise Refused("its dimensions are not those of an image or stack")
    dtype = np.dtype(attributes["dataType"])
    block = math.prod(int(n) for n in attributes["blockSize"]) * dtype.itemsize
    refuse_large_piece(block, "a block of it", "save it again with smaller blocks")
    named = [axis_letter(str(name)) for name in attributes.get("axes") or ()]
    axes = "".join(named) if len(named) == len(shape) else "XYZCT"[: len(shape)]
    open_array = opener(root, key, "n5")
    chunked = open_array()
    stem = short_name(root)
    return Array(
        path=root,
        open=open_array,
        shape=chunked.shape,
        dtype=chunked.dtype,
        axes=axes,
        format="N5",
        pixel_nm=_pixel_size((attributes, *above), axes),
        series=series,
        name=f"{stem}-{series.removesuffix('/s0').replace('/', '-')}" if series else stem,
        piece_bytes=block,
        isolated=True,
    )


def _pixel_size(levels: tuple[Attributes, ...], axes: str) -> dict[str, float | None]:
    """The first size that the dataset or a group above it gives; a pyramid's group gives that of its first level."""
    for attributes in levels:
        try:
            transform = attributes.get("transform")
            if isinstance(transform, Mapping):
                rows = zip(transform["axes"], transform["scale"], transform["units"], strict=True)
                return {axis_letter(str(a)): nanometres(s, u) for a, s, u in rows}
            sizes = voxel_sizes(attributes, axes)
        except (KeyError, TypeError, ValueError):
            continue
        factors = attributes.get("downsamplingFactors")
        if sizes and isinstance(factors, list) and len(factors) == len(axes):
            return {a: s and s * float(f) for (a, s), f in zip(sizes.items(), factors, strict=False)}
        if sizes:
            return sizes
    return {}
