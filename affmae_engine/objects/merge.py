"""From pieces in blocks to objects of the volume: pieces that touch across the faces of blocks are joined.

Objects are numbered by their first voxel in raster order, so numbers do not depend on the blocks.

Axes: P pieces of the whole volume, M objects, B blocks, 3 is z y x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from affmae_engine.objects.blocks import Block, grid_shape
from affmae_engine.objects.job import Pass
from affmae_engine.objects.pairs import NO_PAIRS, PairCounts, add_pairs, best_partner, count_pairs, sum_pairs

Arrays = Mapping[str, np.ndarray]


def merge_pieces(result: Pass, blocks: list[Block], *, sections: bool) -> dict[str, np.ndarray]:
    """Join the pieces of a pass.

    Pieces of the same seed are one object. Pieces without a seed that touch across a face are joined; where they touch
    pieces with a seed, they belong to the one with which they share the largest face. Only pieces of one kind join.

    Args:
        sections: pieces do not join along z.

    Returns:
        first_piece [B + 1], object_of_piece [P] (1 to M), and by object: kind uint8, count, first, low [M, 3],
        high [M, 3], int64.
    """
    tables = [result.arrays(b.index, "kind", "count", "first", "low", "high") for b in blocks]
    kind, count, first, low, high = (np.concatenate([t[i] for t in tables]) for i in range(5))
    first_piece = np.cumsum([0, *(len(t[0]) for t in tables)])
    seed = np.concatenate([_optional(result, b, len(t[0])) for b, t in zip(blocks, tables, strict=True)])
    contacts = face_contacts(result, blocks, first_piece, sections=sections)
    a, b = contacts.ids_N2.astype(np.int64).T
    contacts = contacts.where(kind[a] == kind[b])
    a, b = contacts.ids_N2.astype(np.int64).T

    # Pieces without a seed that touch each other form groups.
    total = len(kind)
    free = seed == 0
    group = _components(total, a, b, free[a] & free[b])
    # A group belongs to the seed that it shares most faces with.
    mixed = free[a] != free[b]
    own, other = np.where(free[a], a, b)[mixed], np.where(free[a], b, a)[mixed]
    best = best_partner(sum_pairs(np.stack([group[own], seed[other]], axis=1), contacts.counts_N[mixed]))
    seed_of_group = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    seed_of_group[best.ids_N2[:, 0].astype(np.int64)] = best.ids_N2[:, 1].astype(np.int64)
    seed = np.where(free, seed_of_group[group], seed)
    # Objects: one per seed, one per group without; numbered by their first voxel.
    key = np.where(seed > 0, seed, int(seed.max(initial=0)) + 1 + group)
    return {
        "first_piece": first_piece,
        **_summed(key, {"kind": kind, "count": count, "first": first, "low": low, "high": high}),
    }


def joined_at_necks(
    result: Pass, blocks: list[Block], table: Arrays, *, share: float, sections: bool
) -> dict[str, np.ndarray]:
    """Join objects whose connection is thick, relative to the thinner of the two.

    Connections are taken from the thickest to the thinnest; what is joined counts as one object from then on.

    Args:
        table: as `merge_pieces` returns it. share: see `DecodeOptions.join_neck`.
    """
    first_piece, object_of_piece = table["first_piece"], table["object_of_piece"]
    total = len(table["kind"])
    peak = np.zeros(total + 1, np.float32)
    pairs, necks = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for block in blocks:
        own, between, thickness = result.arrays(block.index, "peak", "neck_pairs", "necks")
        objects = object_of_piece[first_piece[block.index] : first_piece[block.index + 1]]
        np.maximum.at(peak, objects, own)
        pairs.append(objects[between - 1])
        necks.append(thickness)
    depths = _faces(result, blocks, ("distance_", "distance_"), sections=sections)
    for (low, high, near, far), (_, _, here, there) in zip(
        _faces(result, blocks, ("", ""), sections=sections), depths, strict=True
    ):
        meet = (near > 0) & (far > 0)
        a = object_of_piece[first_piece[low] + near[meet].astype(np.int64) - 1]
        b = object_of_piece[first_piece[high] + far[meet].astype(np.int64) - 1]
        pairs.append(np.stack([a, b], axis=1))
        necks.append(np.minimum(here[meet], there[meet]))
    edges, thickness = np.concatenate(pairs), np.concatenate(necks)
    kind = np.concatenate([np.zeros(1, np.uint8), table["kind"]])
    a, b = edges.min(axis=1), edges.max(axis=1)
    between = (a != b) & (kind[a] == kind[b])
    key, position = np.unique(a[between] * (total + 1) + b[between], return_inverse=True)
    neck = np.zeros(len(key), np.float32)
    np.maximum.at(neck, position, thickness[between])
    a, b = key // (total + 1), key % (total + 1)

    parent = np.arange(total + 1)

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = int(parent[one])
        return one

    chosen = []
    for e in np.lexsort((b, a, -neck)).tolist():
        first, second = root(int(a[e])), root(int(b[e]))
        if first != second and neck[e] >= share * min(peak[first], peak[second]):
            parent[max(first, second)] = min(first, second)
            peak[min(first, second)] = max(peak[first], peak[second])
            chosen.append(e)
    return group_objects(table, np.stack([a[chosen], b[chosen]], axis=1))


def group_objects(table: Arrays, edges_E2: np.ndarray) -> dict[str, np.ndarray]:
    """Join objects of a table (as `merge_pieces` returns it) that are connected by edges between their numbers."""
    a, b = (edges_E2 - 1).T
    total = len(table["kind"])
    group = _components(total, a, b, np.ones(len(a), bool))
    columns = {name: table[name] for name in ("kind", "count", "first", "low", "high")}
    joined = _summed(group, columns)
    renumbered = joined.pop("object_of_piece")
    return {
        "first_piece": table["first_piece"],
        "object_of_piece": _through(renumbered, table["object_of_piece"]),
        **joined,
    }


def keep_objects(table: Arrays, keep_M: np.ndarray) -> dict[str, np.ndarray]:
    """Remove objects from a table; the others move up, removed ones become 0."""
    number = np.where(keep_M, np.cumsum(keep_M), 0)
    columns = {name: table[name][keep_M] for name in ("kind", "count", "first", "low", "high")}
    return {
        "first_piece": table["first_piece"],
        "object_of_piece": _through(number, table["object_of_piece"]),
        **columns,
    }


def merge_holes(result: Pass, blocks: list[Block], *, sections: bool) -> dict[str, np.ndarray]:
    """Decide which pieces of background are holes: enclosed by one object, away from the border of the volume.

    Returns:
        first_piece [B + 1], object_of_piece [P]: the object that encloses the piece, or 0.
    """
    tables = [result.arrays(b.index, "border", "low_object", "high_object") for b in blocks]
    border, low, high = (np.concatenate([t[i] for t in tables]) for i in range(3))
    first_piece = np.cumsum([0, *(len(t[0]) for t in tables)])
    contacts = face_contacts(result, blocks, first_piece, sections=sections)
    a, b = contacts.ids_N2.astype(np.int64).T
    group = _components(len(border), a, b, np.ones(len(a), bool))
    # Objects beyond a face count as neighbors as well.
    for piece, neighbor in _object_contacts(result, blocks, first_piece, sections=sections):
        np.minimum.at(low, piece, neighbor)
        np.maximum.at(high, piece, neighbor)
    groups = int(group.max(initial=-1)) + 1
    open_G = np.bincount(group, border, groups) > 0
    low_G, high_G = np.full(groups, np.iinfo(np.int64).max), np.zeros(groups, np.int64)
    np.minimum.at(low_G, group, low)
    np.maximum.at(high_G, group, high)
    enclosed_G = np.where(~open_G & (low_G == high_G), high_G, 0)
    return {"first_piece": first_piece, "object_of_piece": enclosed_G[group]}


def face_contacts(result: Pass, blocks: list[Block], first_piece: np.ndarray, *, sections: bool) -> PairCounts:
    """Pairs of pieces (positions in the whole volume) that share voxel faces across the faces of blocks."""
    parts = [NO_PAIRS]
    for low, high, near, far in _faces(result, blocks, ("", ""), sections=sections):
        pairs = count_pairs(near, far).both
        if len(pairs.counts_N):
            ids = pairs.ids_N2.astype(np.int64) - 1 + [first_piece[low], first_piece[high]]
            parts.append(PairCounts(ids.astype(np.uint64), pairs.counts_N))
    return add_pairs(parts)


def _object_contacts(
    result: Pass, blocks: list[Block], first_piece: np.ndarray, *, sections: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (pieces, objects that they touch across a face of a block), both ways."""
    for low, _, near, far in _faces(result, blocks, ("", "object_"), sections=sections):
        pairs = count_pairs(near, far).both.ids_N2.astype(np.int64)
        yield pairs[:, 0] - 1 + first_piece[low], pairs[:, 1]
    for _, high, near, far in _faces(result, blocks, ("object_", ""), sections=sections):
        pairs = count_pairs(near, far).both.ids_N2.astype(np.int64)
        yield pairs[:, 1] - 1 + first_piece[high], pairs[:, 0]


def _faces(
    result: Pass, blocks: list[Block], prefixes: tuple[str, str], *, sections: bool
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """For every two blocks that share a face: their indices, the last layer of the first, the first of the second."""
    cells = grid_shape(result.volume, result.block)
    stride = (cells[1] * cells[2], cells[2], 1)
    for block in blocks:
        for axis in range(1 if sections else 0, 3):
            if block.cell[axis] + 1 == cells[axis]:
                continue
            other = block.index + stride[axis]
            (near,) = result.arrays(block.index, f"{prefixes[0]}{'zyx'[axis]}1")
            (far,) = result.arrays(other, f"{prefixes[1]}{'zyx'[axis]}0")
            yield block.index, other, near, far


def _optional(result: Pass, block: Block, count: int) -> np.ndarray:
    """The seeds of a block's pieces, 0 in a pass that has none."""
    with np.load(result.file(block.index), allow_pickle=False) as file:
        return file["seed"] if "seed" in file.files else np.zeros(count, np.int64)


def _components(total: int, a: np.ndarray, b: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Component number of each of `total` nodes under the chosen edges."""
    a, b = a[use], b[use]
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(total, total))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64) if total else np.empty(0, np.int64)


def _summed(key_P: np.ndarray, columns: Arrays) -> dict[str, np.ndarray]:
    """Sum up a table by key and number the results by their first voxel."""
    _, group = np.unique(key_P, return_inverse=True)
    total = int(group.max(initial=-1)) + 1
    first = np.full(total, np.iinfo(np.int64).max)
    np.minimum.at(first, group, columns["first"])
    order = np.argsort(first)
    rank = np.empty(total, np.int64)
    rank[order] = np.arange(total)
    group = rank[group]
    kind, count = np.zeros(total, np.uint8), np.zeros(total, np.int64)
    low, high = np.full((total, 3), np.iinfo(np.int64).max), np.zeros((total, 3), np.int64)
    kind[group] = columns["kind"]
    np.add.at(count, group, columns["count"])
    np.minimum.at(low, group, columns["low"])
    np.maximum.at(high, group, columns["high"])
    return {"object_of_piece": group + 1, "kind": kind, "count": count, "first": first[order], "low": low, "high": high}


def _through(number_M: np.ndarray, objects_P: np.ndarray) -> np.ndarray:
    """Numbers of objects (1 to M, 0 stays) replaced by `number_M`."""
    return np.concatenate([np.zeros(1, np.int64), number_M])[objects_P]
