"""Sparse counts of pairs of ids: contingency tables, overlaps of sections, contacts between objects.

Counts are integers and addition is exact, so a table does not depend on the blocks that it was gathered from.

Axes: N pairs, 2 the two ids of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PairCounts:
    """How often each pair of ids occurs: ids_N2 uint64, sorted and unique; counts_N int64."""

    ids_N2: np.ndarray
    counts_N: np.ndarray

    def where(self, keep_N: np.ndarray) -> PairCounts:
        """The pairs selected by a boolean mask [N]."""
        return PairCounts(self.ids_N2[keep_N], self.counts_N[keep_N])

    @property
    def both(self) -> PairCounts:
        """The pairs without id 0 (background)."""
        return self.where((self.ids_N2 != 0).all(axis=1))


NO_PAIRS = PairCounts(np.empty((0, 2), np.uint64), np.empty(0, np.int64))


def count_pairs(first: np.ndarray, second: np.ndarray) -> PairCounts:
    """Count the pairs of values at the same place of two integer arrays of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"arrays of shapes {first.shape} and {second.shape} have no pairs")
    if not first.size:
        return NO_PAIRS
    # Label volumes are constant along most of a row: only run starts are sorted.
    a, b = first.ravel(), second.ravel()
    starts = np.flatnonzero(np.concatenate([[True], (a[1:] != a[:-1]) | (b[1:] != b[:-1])]))
    lengths = np.diff(np.append(starts, a.size))
    return sum_pairs(np.stack([a[starts].astype(np.uint64), b[starts].astype(np.uint64)], axis=1), lengths)


def sum_pairs(ids_N2: np.ndarray, counts_N: np.ndarray) -> PairCounts:
    """A table from pairs that may repeat."""
    if not len(ids_N2):
        return NO_PAIRS
    order = np.lexsort((ids_N2[:, 1], ids_N2[:, 0]))
    ids, counts = ids_N2[order].astype(np.uint64), counts_N[order].astype(np.int64)
    first = np.flatnonzero(np.concatenate([[True], (ids[1:] != ids[:-1]).any(axis=1)]))
    return PairCounts(ids[first], np.add.reduceat(counts, first))


def add_pairs(tables: Sequence[PairCounts]) -> PairCounts:
    """The sum of several tables."""
    filled = [table for table in tables if len(table.counts_N)]
    if not filled:
        return NO_PAIRS
    return sum_pairs(np.concatenate([t.ids_N2 for t in filled]), np.concatenate([t.counts_N for t in filled]))


def compact(labels: np.ndarray[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids in an array of any integer ids, and the array with each id replaced by its position among them.

    Returns:
        ids [N] uint64, sorted, with 0 always first; positions int32 of the shape of `labels`.
    """
    flat = labels.ravel()
    if not flat.size:
        return np.zeros(1, np.uint64), np.zeros(labels.shape, np.int32)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ids, position = np.unique(flat[starts].astype(np.uint64), return_inverse=True)
    if ids[0] != 0:
        ids, position = np.concatenate([np.zeros(1, np.uint64), ids]), position + 1
    lengths = np.diff(np.append(starts, flat.size))
    return ids, np.repeat(position.astype(np.int32), lengths).reshape(labels.shape)


def best_partner(pairs: PairCounts) -> PairCounts:
    """For every first id, the pair with the highest count; of equal ones that with the lowest second id."""
    if not len(pairs.counts_N):
        return NO_PAIRS
    order = np.lexsort((pairs.ids_N2[:, 1], -pairs.counts_N, pairs.ids_N2[:, 0]))
    ids = pairs.ids_N2[order]
    first = np.concatenate([[True], ids[1:, 0] != ids[:-1, 0]])
    return PairCounts(ids[first], pairs.counts_N[order][first])
