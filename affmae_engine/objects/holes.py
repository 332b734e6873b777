"""Holes of objects: background that one object encloses, found exactly whatever the blocks.

The pieces of background of a block are joined across faces (`merge.merge_holes`); a hole is what touches one object
only and not the border of the volume.

Axes: Z Y X, N pieces of background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from affmae_engine.objects.blocks import Block
from affmae_engine.objects.decode import connected, faces
from affmae_engine.objects.job import Pass


@dataclass(frozen=True)
class Objects:
    """The numbers of objects as a volume: pieces of a pass, replaced by the objects that they belong to."""

    pieces: Pass
    first_piece: np.ndarray
    object_of_piece: np.ndarray

    def read(self, z: slice, y: slice, x: slice) -> np.ndarray:
        """A window of the volume; int64, 0 is background."""
        return self.pieces.read(z, y, x, table=self.numbers)

    def numbers(self, index: int) -> np.ndarray:
        """Objects by the voxel values of a block."""
        first, stop = self.first_piece[index : index + 2]
        return np.concatenate([np.zeros(1, np.int64), self.object_of_piece[first:stop]])


@dataclass(frozen=True)
class Holes:
    """The pieces of background of a block.

    Attributes:
        sections: holes are looked for in each section by itself.
    """

    objects: Objects
    sections: bool

    def __call__(self, block: Block) -> dict[str, np.ndarray]:
        """voxels (uint32 pieces), faces of pieces and of objects, and by piece: border (touches the border of the
        volume), low_object and high_object (lowest and highest number of the objects that it touches in the block)."""
        volume = self.objects.pieces.volume
        objects = self.objects.read(*block.window)
        labels = connected((objects == 0).astype(np.uint8), sections=self.sections)
        count = int(labels.max(initial=0))
        low, high = np.full(count + 1, np.iinfo(np.int64).max), np.zeros(count + 1, np.int64)
        border = np.zeros(count + 1, bool)
        for axis in range(1 if self.sections else 0, 3):
            ahead, behind = (np.moveaxis(v, axis, 0) for v in (labels, objects))
            for piece, neighbor in ((ahead[:-1], behind[1:]), (ahead[1:], behind[:-1])):
                touching = (piece > 0) & (neighbor > 0)
                np.minimum.at(low, piece[touching], neighbor[touching])
                np.maximum.at(high, piece[touching], neighbor[touching])
            if block.start[axis] == 0:
                border[np.unique(ahead[0])] = True
            if block.stop[axis] == volume[axis]:
                border[np.unique(ahead[-1])] = True
        return {
            "voxels": labels.astype(np.uint32),
            **faces(labels),
            **faces(objects, "object_"),
            "border": border[1:],
            "low_object": low[1:],
            "high_object": high[1:],
        }
