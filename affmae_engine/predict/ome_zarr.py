"""Labels and class probabilities as OME-Zarr 0.5, written row by row, each shard once.

zarr would read, merge and rewrite a shard that is written in parts, so rows are held until they make up a row of
shards; small sections are held until they fill a shard along z. Memory: one such row of shards, 1024 rows of the
volume or 16 Mpx of small sections, times the classes for probabilities. Every chunk ends in a CRC-32C: zstd alone does
not notice most flipped bits.

Axes: L leading axes (none for labels, classes for probabilities), R rows of one piece, Z Y X volume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from affmae_engine.data.readers import PixelSize
from affmae_engine.data.store_layout import image_attributes

CHUNK = 512
SHARD_ROWS = 2
"""Chunks of a shard along y."""
SHARD_COLUMNS = 16
"""Chunks of a shard along x."""
SLAB_PIXELS = 1 << 24
SLAB_SECTIONS = 32

ATTRIBUTE = "affmae_prediction"
"""Key of our own record in the attributes of an output; dataset stores have another one."""


class ZarrRows:
    """One array [L..., Z, Y, X] in a new group, filled by rows in order.

    Args:
        folder: the group's folder; created or empty. The caller makes it appear atomically.
        lead: sizes of the leading axes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shape_ZYX: tuple[int, int, int],
        dtype: np.dtype[Any],
        lead: tuple[int, ...] = (),
        attributes: dict[str, Any],
        dimension_names: tuple[str, ...],
    ) -> None:
        depth, height, width = shape_ZYX
        chunk = (1, min(CHUNK, height), min(CHUNK, width))
        rows = _up_to(height, chunk[1], SHARD_ROWS)
        self._together = 1 if rows < height else min(depth, SLAB_SECTIONS, max(1, SLAB_PIXELS // (height * width)))
        shard = (self._together, rows, _up_to(width, chunk[2], SHARD_COLUMNS))
        self._shape, self._lead = shape_ZYX, lead
        self._rows = rows
        group = zarr.create_group(folder, attributes=attributes, overwrite=False)
        self._array: Any = group.create_array(
            "0",
            shape=(*lead, *shape_ZYX),
            chunks=(*(1 for _ in lead), *chunk),
            shards=(*(1 for _ in lead), *shard),
            dtype=dtype,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            fill_value=0,
            dimension_names=dimension_names,
            config={"write_empty_chunks": True},  # a missing chunk is damage, never background
        )
        self._held = np.zeros((*lead, self._together, min(rows, height), width), dtype)
        self._z = self._done = 0

    def add(self, z: int, first_row: int, values: np.ndarray) -> None:
        """Append rows [L..., R, X]; everything before them must have been added.

        Raises:
            ValueError: rows are missing or out of order.
        """
        if (z, first_row) != (self._z, self._done):
            raise ValueError(f"rows out of order: {z}, {first_row} after {self._z}, {self._done}")
        offset = 0
        while offset < values.shape[-2]:
            within = self._done % self._rows
            take = min(values.shape[-2] - offset, self._held.shape[-2] - within)
            self._held[..., self._z % self._together, within : within + take, :] = values[
                ..., offset : offset + take, :
            ]
            offset += take
            self._done += take
            if self._done % self._rows == 0 or self._done == self._shape[1]:
                self._row_of_shards_done()

    def _row_of_shards_done(self) -> None:
        depth, height, _ = self._shape
        slot = self._z % self._together
        if slot + 1 == self._together or self._z + 1 == depth:
            low = (self._done - 1) // self._rows * self._rows
            block = self._held[..., : slot + 1, : self._done - low, :]
            self._array[..., self._z - slot : self._z + 1, low : self._done, :] = block
        if self._done == height:
            self._z, self._done = self._z + 1, 0


def labels_attributes(
    name: str, pixel_nm: PixelSize, class_names: tuple[str, ...], colours: np.ndarray, record: dict[str, Any]
) -> dict[str, Any]:
    """Group attributes of a label volume: OME image-label with a colour and a name for every class.

    Args:
        colours: uint8 [classes, 3]; class 0 is shown transparent.
    """
    label = {
        "version": "0.5",
        "colors": [
            {"label-value": value, "rgba": [*(int(part) for part in colour), 255 if value else 0]}
            for value, colour in enumerate(colours)
        ],
        "properties": [{"label-value": value, "class": text} for value, text in enumerate(class_names)],
    }
    ome = image_attributes(name, pixel_nm)["ome"] | {"image-label": label}
    return {"ome": ome, ATTRIBUTE: record}


def probabilities_attributes(
    name: str, pixel_nm: PixelSize, class_names: tuple[str, ...], record: dict[str, Any]
) -> dict[str, Any]:
    """Group attributes of class probabilities: a channel per class, shown from 0 to 255 (probability 1)."""
    channels = [
        {
            "label": text,
            "color": "FFFFFF",
            "active": index == 0,
            "window": {"min": 0, "max": 255, "start": 0, "end": 255},
        }
        for index, text in enumerate(class_names)
    ]
    ome = image_attributes(name, pixel_nm)["ome"] | {"omero": {"channels": channels}}
    (image,) = ome["multiscales"]
    image["axes"].insert(0, {"name": "c", "type": "channel"})
    image["datasets"][0]["coordinateTransformations"][0]["scale"].insert(0, 1.0)
    return {"ome": ome, ATTRIBUTE: {**record, "probability": "value / 255"}}


def _up_to(length: int, chunk: int, count: int) -> int:
    """Edge of a shard: as many chunks as the axis has, at most `count`."""
    return chunk * min(count, -(-length // chunk))
