"""Neuroglancer's precomputed volumes, the format of most published connectomes; axes are (x, y, z, channel).

The `info` file describes the scales (https://github.com/google/neuroglancer, precomputed/volume.md); the one with the
smallest voxels is taken, which is the first. Resolutions are in nanometers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.arrays import Array, array_source
from affmae_engine.data.readers.files import split_inner
from affmae_engine.data.readers.hierarchy import Hierarchy, LocalHierarchy
from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.remote import library, opener
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.data.readers.units import nanometres


def open_precomputed(
    path: Path, options: ReadOptions, tree: Hierarchy | None = None
) -> Found:  # fmt: skip
    """The volume in a folder or behind a URL, at full resolution.

    Args:
        tree: its metadata, where it was opened already (remote).

    Raises:
        InputError: its `info` is damaged, it is a segmentation and no labels are wanted, or tensorstore is missing.
    """
    library("precomputed")
    path = split_inner(path)[0]
    with reading(path):
        info = (tree or LocalHierarchy(path)).json("", "info") or {}
        if info.get("type") == "segmentation" and not options.labels:
            raise Refused(
                "it is a label map (segmentation), not an image", "finetune and predict take it with --labels"
            )
        return [array_source(_describe(path, info), options)], []


def _describe(path: Path, info: dict[str, Any]) -> Array:
    scales = info["scales"]
    number = min(range(len(scales)), key=lambda i: math.prod(scales[i]["resolution"]))
    scale = scales[number]
    itemsize = np.dtype(info["data_type"]).itemsize
    piece = max(math.prod(chunk) for chunk in scale["chunk_sizes"]) * int(info["num_channels"]) * itemsize
    refuse_large_piece(piece, "a chunk of it", "save it again with smaller chunks")
    open_array = opener(path, "", "neuroglancer_precomputed", scale_index=number)
    chunked = open_array()
    return Array(
        path=path,
        open=open_array,
        shape=chunked.shape,
        dtype=chunked.dtype,
        axes="XYZC",
        format="precomputed",
        pixel_nm={axis: nanometres(size, "nm") for axis, size in zip("XYZ", scale["resolution"], strict=True)},
        piece_bytes=piece,
        isolated=True,
    )
