"""Where the cells of the phantom are: balls packed into a box and linked into neurites.

Unusual: neuropil mixes profiles of 100 nm with profiles of 2 um and leaves hardly a gap. Balls of falling size are
thrown at random and kept where they do not overlap; neighbours of similar size are then linked into chains, so
that a cell is a beaded tube, and what lies farther than some distance from every ball is left to glia.

Axes: N balls, 3 is z y x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
# Radius in nm and how many to throw, as the fraction of the box that they would fill if all of them stayed.
_SIZES = ((780.0, 0.12), (520.0, 0.20), (340.0, 0.30), (220.0, 0.5), (150.0, 1.1), (105.0, 2.2), (72.0, 3.0))
_OVERLAP = 0.90  # balls may come as near as this fraction of the sum of their radii


@dataclass(frozen=True)
class Balls:
    """Balls in packing space: centre_N3 and radius_N in nm, cell_N ids from 1 without gaps."""

    centre_N3: F64
    radius_N: F64
    cell_N: I32


def _drop_overlaps(centre_N3: F64, radius_N: F64) -> NDArray[np.bool_]:
    """Which of the new balls stay when each yields to those before it."""
    keep = np.ones(len(centre_N3), dtype=bool)
    if len(centre_N3) < 2:
        return keep
    pairs = cKDTree(centre_N3).query_pairs(2 * _OVERLAP * float(radius_N.max()), output_type="ndarray")
    gap = np.linalg.norm(centre_N3[pairs[:, 0]] - centre_N3[pairs[:, 1]], axis=1)
    pairs = pairs[gap < _OVERLAP * (radius_N[pairs[:, 0]] + radius_N[pairs[:, 1]])]
    for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
        if keep[first]:
            keep[second] = False
    return keep


def _throw(rng: np.random.Generator, low: F64, high: F64) -> tuple[F64, F64]:
    """Non-overlapping balls, the largest sizes first: centres (N, 3) and radii (N,)."""
    placed: list[tuple[F64, F64]] = []
    for nominal, fill in _SIZES:
        count = rng.poisson(fill * float(np.prod(high - low)) / (4 / 3 * np.pi * nominal**3))
        centre_N3 = rng.uniform(low, high, (count, 3))
        radius_N = nominal * rng.uniform(0.82, 1.18, count)
        for old_centre_N3, old_radius_N in placed:
            if not len(centre_N3) or not len(old_centre_N3):
                continue
            reach = _OVERLAP * (float(old_radius_N.max()) + 1.18 * nominal)
            near = cKDTree(centre_N3).query_ball_tree(cKDTree(old_centre_N3), reach)
            index = np.repeat(np.arange(len(near)), [len(n) for n in near])
            other = np.array([j for n in near for j in n], dtype=int)
            gap = np.linalg.norm(centre_N3[index] - old_centre_N3[other], axis=1)
            hit = index[gap < _OVERLAP * (radius_N[index] + old_radius_N[other])]
            keep = np.ones(len(centre_N3), dtype=bool)
            keep[hit] = False
            centre_N3, radius_N = centre_N3[keep], radius_N[keep]
        keep = _drop_overlaps(centre_N3, radius_N)
        placed.append((centre_N3[keep], radius_N[keep]))
    return np.concatenate([c for c, _ in placed]), np.concatenate([r for _, r in placed])


def _links(rng: np.random.Generator, centre_N3: F64, radius_N: F64) -> list[tuple[int, int]]:
    """Pairs of balls that belong to one neurite: alike in size, hardly bent, at most two (rarely three) per ball."""
    if len(centre_N3) < 2:
        return []
    tree = cKDTree(centre_N3)
    distance, other = tree.query(centre_N3, k=min(14, len(centre_N3)))
    first = np.repeat(np.arange(len(centre_N3)), other.shape[1] - 1)
    second, gap = other[:, 1:].ravel(), distance[:, 1:].ravel()
    ordered = first < second
    first, second, gap = first[ordered], second[ordered], gap[ordered]
    ratio = np.minimum(radius_N[first], radius_N[second]) / np.maximum(radius_N[first], radius_N[second])
    apart = gap - radius_N[first] - radius_N[second]
    score = ratio - np.maximum(apart, 0) / 120 + 0.35 * rng.random(len(first))
    limit = np.where(rng.random(len(centre_N3)) < 0.06, 3, 2)
    ways: list[list[F64]] = [[] for _ in range(len(centre_N3))]
    kept: list[tuple[int, int]] = []
    useful = np.flatnonzero((apart < 90) & (ratio > 0.3))
    for pair in useful[np.argsort(-score[useful], kind="stable")].tolist():
        i, j = int(first[pair]), int(second[pair])
        if len(ways[i]) >= limit[i] or len(ways[j]) >= limit[j]:
            continue
        way = (centre_N3[j] - centre_N3[i]) / gap[pair]
        if any(float(w @ way) > 0.25 for w in ways[i]) or any(float(w @ -way) > 0.25 for w in ways[j]):
            continue
        ways[i].append(way)
        ways[j].append(-way)
        kept.append((i, j))
    return kept


def pack(rng: np.random.Generator, low: F64, high: F64) -> Balls:
    """Neurites that fill the box from `low` to `high` (z y x, nm) as chains of balls."""
    centre_N3, radius_N = _throw(rng, low, high)
    if not len(centre_N3):  # a Poisson draw may come out empty in a tiny box
        centre_N3, radius_N = (low + high)[None] / 2, np.array([_SIZES[2][0]])
    links = np.array(_links(rng, centre_N3, radius_N), dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(centre_N3),) * 2)
    _, cell_N = connected_components(graph, directed=False)
    # A ball between two linked ones makes a neck where the chain would otherwise pinch to a point.
    i, j = links[:, 0], links[:, 1]
    share = (radius_N[i] / (radius_N[i] + radius_N[j]))[:, None]
    neck_N3 = centre_N3[i] + share * (centre_N3[j] - centre_N3[i])
    neck_radius_N = np.minimum(radius_N[i], radius_N[j]) * rng.uniform(0.6, 0.9, len(links))
    return Balls(
        centre_N3=np.concatenate([centre_N3, neck_N3]),
        radius_N=np.concatenate([radius_N, neck_radius_N]),
        cell_N=np.concatenate([cell_N, cell_N[i]]).astype(np.int32) + 1,
    )
