"""A picture of a few sections, plain and with their labels, gathered while the labels stream by.

Large sections are shown reduced: labels are sampled, the image is averaged over the same blocks.

Axes: Y X section, R rows of one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from affmae_engine.data.readers import Source
from affmae_engine.data.statistics import Statistics
from affmae_engine.errors import AffmaeError, one_line
from affmae_engine.picture_files import save_png
from affmae_engine.predict.label_rows import LabelRows
from affmae_engine.visualize import overlay, to_grey

LONGEST_EDGE = 768
"""Pixels of the longer edge of one section in the picture, at most."""
SECTIONS = 3
GAP = 8
"""White pixels between two panels."""


class OverlayPicture:
    """Collects reduced labels of sections spread evenly over a volume, then draws them over the image.

    Args:
        shape_ZYX: of the volume.
    """

    def __init__(self, shape_ZYX: tuple[int, int, int]) -> None:
        depth, height, width = shape_ZYX
        self.sections = sorted({(2 * i + 1) * depth // (2 * SECTIONS) for i in range(SECTIONS)})
        step = -(-max(height, width) // LONGEST_EDGE)
        self._step = min(step, height), min(step, width)  # an edge shorter than a block is one block
        self._shape = height // self._step[0], width // self._step[1]
        self.path: Path | None = None
        """Where it was written, once it is."""
        self._labels = {z: np.zeros(self._shape, np.uint32) for z in self.sections}

    def add(self, piece: LabelRows) -> None:
        """Take what is needed of some rows."""
        target = self._labels.get(piece.z)
        if target is None:
            return
        down, across = self._step
        half = down // 2
        first = -(-max(0, piece.first_row - half) // down)
        last = min(self._shape[0], -(-max(0, piece.first_row + len(piece.labels_RX) - half) // down))
        if last <= first:
            return
        rows = np.arange(first, last) * down + half - piece.first_row
        columns = np.arange(self._shape[1]) * across + across // 2
        target[first:last] = piece.labels_RX[rows][:, columns]

    def save(self, path: Path, source: Source, statistics: Statistics, class_names: Sequence[str]) -> None:
        """Draw the sections side by side, plain above and labelled below, and write the PNG atomically.

        Raises:
            InputError: the image cannot be read any more.
            ResourceError: the picture cannot be written.
        """
        limits = statistics.percentiles["0.5"], statistics.percentiles["99.5"]
        grey: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for z in self.sections:
            grey += [to_grey(self._reduced(source, z), limits), _gap(self._shape[0], GAP, 255)]
            labels += [self._labels[z], _gap(self._shape[0], GAP, 0)]
        image_YX, labels_YX = np.concatenate(grey[:-1], axis=1), np.concatenate(labels[:-1], axis=1)
        # Above, everything is class 0, which is drawn without colour: the same sections as they are.
        gap = GAP, image_YX.shape[1]
        doubled = np.concatenate([image_YX, _gap(*gap, 255), image_YX])
        coloured = np.concatenate([np.zeros_like(labels_YX), _gap(*gap, 0), labels_YX])
        save_png(path, overlay(doubled, coloured, class_names))

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
        """Means over the blocks of a section, read a few rows at a time; float32."""
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
