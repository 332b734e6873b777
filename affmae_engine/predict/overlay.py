"""A picture of a few sections, plain above and with their labels below.

Large sections are shown reduced: labels are sampled, the image is averaged over the same squares.

Axes: Y X section.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from affmae_engine.data.readers import Source
from affmae_engine.data.statistics import Statistics
from affmae_engine.errors import AffmaeError, one_line
from affmae_engine.picture_files import save_png
from affmae_engine.predict.volume import Pyramid
from affmae_engine.visualize import overlay, to_grey

LONGEST_EDGE = 768
"""Pixels of the longer edge of one section in the picture, at most."""
SECTIONS = 3
GAP = 8
"""White pixels between two panels."""


class OverlayPicture:
    """Sections spread evenly over a volume.

    Args:
        shape_ZYX: of the volume.
    """

    def __init__(self, shape_ZYX: tuple[int, int, int]) -> None:
        depth, height, width = shape_ZYX
        self.sections = sorted({(2 * i + 1) * depth // (2 * SECTIONS) for i in range(SECTIONS)})
        step = -(-max(height, width) // LONGEST_EDGE)
        self._step = min(step, height), min(step, width)  # an edge shorter than a square is one square
        self._shape = height // self._step[0], width // self._step[1]
        self.path: Path | None = None
        """Where it was written, once it is."""
        self._labels: list[np.ndarray] = []

    def gather(self, labels: Pyramid | None) -> None:
        """Take the labels of the sections, from the coarsest level that has a pixel for every square."""
        assert labels is not None
        level = min(len(labels.levels) - 1, max(0, min(self._step).bit_length() - 1))
        rows, columns = (
            (np.arange(count) * step + step // 2) >> level for count, step in zip(self._shape, self._step, strict=True)
        )
        array = labels.arrays[level]
        rows, columns = np.minimum(rows, array.shape[1] - 1), np.minimum(columns, array.shape[2] - 1)
        self._labels = [array[z][rows][:, columns].astype(np.uint32) for z in self.sections]

    def gather_from(self, labels: Source) -> None:
        """Take the labels of the sections from a finished output.

        Raises:
            InputError: it cannot be read.
        """
        rows, columns = (
            np.arange(count) * step + step // 2 for count, step in zip(self._shape, self._step, strict=True)
        )
        everything = slice(None)
        self._labels = [
            np.stack([labels.read(slice(z, z + 1), slice(y, y + 1), everything)[0, 0, columns] for y in rows]).astype(
                np.uint32
            )
            for z in self.sections
        ]

    def save(self, path: Path, source: Source, statistics: Statistics, class_names: Sequence[str]) -> None:
        """Draw the sections side by side and write the PNG atomically.

        Raises:
            InputError: the image cannot be read any more.
            ResourceError: the picture cannot be written.
        """
        limits = statistics.percentiles["0.5"], statistics.percentiles["99.5"]
        grey: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for z, labels_YX in zip(self.sections, self._labels, strict=True):
            grey += [to_grey(self._reduced(source, z), limits), _gap(self._shape[0], GAP, 255)]
            labels += [labels_YX, _gap(self._shape[0], GAP, 0)]
        image_YX, classes_YX = np.concatenate(grey[:-1], axis=1), np.concatenate(labels[:-1], axis=1)
        # Above, everything is class 0, which is drawn without color: the same sections as they are.
        gap = GAP, image_YX.shape[1]
        doubled = np.concatenate([image_YX, _gap(*gap, 255), image_YX])
        colored = np.concatenate([np.zeros_like(classes_YX), _gap(*gap, 0), classes_YX])
        save_png(path, overlay(doubled, colored, class_names))

    def attempt(self, path: Path, source: Source, statistics: Statistics, class_names: Sequence[str]) -> list[str]:
        """Like `save`, but returns what went wrong as a warning; none when nothing did."""
        try:
            self.save(path, source, statistics, class_names)
        except Exception as error:  # a picture must never cost the labels of this image and of those after it
            reason = error.message if isinstance(error, AffmaeError) else f"cannot draw {path}: {one_line(error)}"
            return [f"there is no picture of {source.info.name}: {reason}"]
        self.path = path
        return []

    def _reduced(self, source: Source, z: int) -> np.ndarray:
        """Means over the squares of a section, read a few rows at a time; float32."""
        rows, columns = self._shape
        down, across = self._step
        width = columns * across
        result = np.empty(self._shape, np.float32)
        together = max(1, (1 << 22) // (width * down))
        for first in range(0, rows, together):
            last = min(rows, first + together)
            block = source.read(slice(z, z + 1), slice(first * down, last * down), slice(0, width))[0]
            blocks = block.astype(np.float32).reshape(last - first, down, columns, across)
            result[first:last] = blocks.mean(axis=(1, 3))
        return result


def _gap(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width), value, np.uint8)
