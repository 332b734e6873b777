"""Linking the objects of single sections to objects of a stack, by their overlap.

Two objects of neighboring sections belong together when their IoU is high, or when most of the smaller one is covered
by the other (a branch, or a process that grows thinner). Where an object has no partner in the next section, because
that is missing or damaged, partners are looked for in the sections after it.

Axes: E edges, M objects of single sections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from affmae_engine.objects.blocks import Block
from affmae_engine.objects.holes import Objects
from affmae_engine.objects.pairs import PairCounts, count_pairs


@dataclass(frozen=True)
class Overlaps:
    """The overlaps of a block's objects with those of the sections after it; gaps: how many sections further."""

    objects: Objects
    gaps: int

    def __call__(self, block: Block) -> dict[str, np.ndarray]:
        """pairs1 [E, 2], counts1 [E]: objects that overlap in sections next to each other, pairs2 one further, ..."""
        z, y, x = block.window
        numbers = self.objects.read(slice(z.start, min(self.objects.pieces.volume[0], z.stop + self.gaps)), y, x)
        result: dict[str, np.ndarray] = {}
        for gap in range(1, self.gaps + 1):
            below = numbers[gap : gap + block.shape[0]]
            pairs = count_pairs(numbers[: len(below)], below).both
            result |= {f"pairs{gap}": pairs.ids_N2, f"counts{gap}": pairs.counts_N}
        return result


def links(
    overlaps: list[PairCounts], count_M: np.ndarray, kind_M: np.ndarray, *, iou: float, overlap: float
) -> np.ndarray:
    """Edges [E, 2] between objects (numbers from 1) that belong together.

    Args:
        overlaps: voxels that pairs of objects share, for sections 1, 2, ... apart.
        count_M, kind_M: voxels and kind of each object; other kinds are never linked.
        iou, overlap: thresholds of the IoU, and of the shared part of the smaller object.
    """
    edges: list[np.ndarray] = []
    followed, preceded = np.zeros(len(count_M) + 1, bool), np.zeros(len(count_M) + 1, bool)
    for pairs in overlaps:
        upper, lower = pairs.ids_N2.astype(np.int64).T
        shared = pairs.counts_N
        first, second = count_M[upper - 1], count_M[lower - 1]
        good = (shared >= iou * (first + second - shared)) | (shared >= overlap * np.minimum(first, second))
        good &= kind_M[upper - 1] == kind_M[lower - 1]
        # Across a gap, only ends that nothing nearer continues.
        good &= ~(followed[upper] | preceded[lower])
        edges.append(np.stack([upper[good], lower[good]], axis=1))
        followed[upper[good]] = preceded[lower[good]] = True
    return np.concatenate(edges) if edges else np.empty((0, 2), np.int64)
