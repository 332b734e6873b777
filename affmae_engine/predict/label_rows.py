"""What the writers of labels are given: rows in order, and the facts that go into the file's metadata.

Axes: Z Y X volume, R rows of one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from affmae_engine.data.readers import PixelSize


@dataclass(frozen=True)
class LabelRows:
    """Rows first_row..first_row+R-1 of section z. They come in order: all rows of section 0, then of section 1, ..."""

    z: int
    first_row: int
    labels_RX: np.ndarray


@dataclass(frozen=True)
class OutputInfo:
    """A label volume about to be written.

    origin: what made it (source file, weights, step, version), plain JSON values.
    """

    name: str
    shape_ZYX: tuple[int, int, int]
    dtype: np.dtype[Any]
    pixel_nm: PixelSize
    class_names: tuple[str, ...]
    origin: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all labels, uncompressed."""
        z, y, x = self.shape_ZYX
        return z * y * x * self.dtype.itemsize

    def record(self) -> dict[str, Any]:
        """What an output says about itself, as plain JSON values."""
        return {"class_names": list(self.class_names), "pixel_nm_zyx": list(self.pixel_nm), **self.origin}


def label_dtype(classes: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds the labels 0..classes-1."""
    return np.min_scalar_type(max(0, classes - 1))


def regroup(pieces: Iterable[LabelRows], height: int, count: int) -> Iterator[LabelRows]:
    """The same rows in pieces of exactly `count` rows; the last piece of a section holds the rest.

    Raises:
        ValueError: rows are missing or out of order.
    """
    held: list[np.ndarray] = []
    z, done, held_rows = 0, 0, 0
    for piece in pieces:
        if (piece.z, piece.first_row) != (z, done + held_rows):
            raise ValueError(f"rows out of order: {piece.z}, {piece.first_row} after {z}, {done + held_rows}")
        held.append(piece.labels_RX)
        held_rows += len(piece.labels_RX)
        while held_rows >= count or (held_rows and done + held_rows == height):
            block = np.concatenate(held) if len(held) > 1 else held[0]
            take = min(count, held_rows)
            yield LabelRows(z, done, block[:take])
            done, held_rows = done + take, held_rows - take
            held = [block[take:]] if held_rows else []
        if done == height:
            z, done = z + 1, 0
