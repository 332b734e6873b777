"""Measurements of objects, gathered block by block: sizes, shapes, positions, contacts.

A block adds integers to what is known of each object (voxels, sums of coordinates and of their products, extent,
crossings of lines with its surface, grey values, contacts). Integer sums do not depend on the blocks; the final numbers
follow from them at the end. Only the grey values of float images are summed as floats, to rounding.

Axes: N objects, D directions of lines (see `surface.py`), 3 is z y x, 6 is zz yy xx yx zx zy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial import cKDTree

from affmae_engine.objects.blocks import Block, ReadWindow, Shape, read_padded
from affmae_engine.objects.pairs import NO_PAIRS, PairCounts, add_pairs, best_partner, compact, count_pairs, sum_pairs
from affmae_engine.objects.surface import DIRECTIONS_2D, DIRECTIONS_3D, crossing_areas, crossing_lengths

_PRODUCTS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
_FACES = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_EXACT = 1 << 62


@dataclass(frozen=True)
class Gathered:
    """Integer facts of the objects in some part of a volume; `merge` adds parts up.

    Attributes:
        ids_N: uint64, sorted, without 0.
        voxels_N: voxels. sums_N3, products_N6: sums of voxel indices and of their products.
        low_N3, high_N3: first and last index + 1 along each axis.
        crossings_ND: pairs of neighboring voxels of which exactly one belongs to the object.
        grey_N: sum of the image's values, or None without an image.
        contacts: for z, y, x: pairs of objects (lower id first) and the voxel faces that they share.
        classes: pairs (object, class) and their voxels. hosts: pairs (object, id in a second label volume).
    """

    ids_N: np.ndarray
    voxels_N: np.ndarray
    sums_N3: np.ndarray
    products_N6: np.ndarray
    low_N3: np.ndarray
    high_N3: np.ndarray
    crossings_ND: np.ndarray
    grey_N: np.ndarray | None
    contacts: tuple[PairCounts, PairCounts, PairCounts] = (NO_PAIRS, NO_PAIRS, NO_PAIRS)
    classes: PairCounts = NO_PAIRS
    hosts: PairCounts = NO_PAIRS


@dataclass(frozen=True)
class Inputs:
    """Volumes of one shape, read by windows: labels; where given, image, class map, and labels of enclosing objects."""

    shape: Shape
    labels: ReadWindow
    image: ReadWindow | None = None
    class_map: ReadWindow | None = None
    hosts: ReadWindow | None = None


def gather(inputs: Inputs, block: Block) -> Gathered:
    """The facts of the objects in one block.

    Raises:
        InputError, ResourceError: a volume cannot be read.
    """
    labels_ZYX = read_padded(inputs.labels, block, 2, inputs.shape)
    ids, local_ZYX = compact(labels_ZYX)
    core_ZYX = local_ZYX[2:-2, 2:-2, 2:-2]
    crossings, contacts = _crossings(local_ZYX, ids, block, inputs.shape)
    image_ZYX = None if inputs.image is None else inputs.image(*block.window)
    part = _moments(core_ZYX, len(ids), block, inputs.shape, image_ZYX)
    part = replace(part, ids_N=ids, crossings_ND=crossings, contacts=contacts)
    if inputs.class_map is not None:
        part = replace(part, classes=_overlaps(core_ZYX, ids, inputs.class_map(*block.window)))
    if inputs.hosts is not None:
        part = replace(part, hosts=_overlaps(core_ZYX, ids, inputs.hosts(*block.window)))
    # Objects that only the margin shows may have crossings here, whose first voxel lies outside the volume.
    present = (part.voxels_N > 0) | part.crossings_ND.any(axis=1)
    present[0] = False
    return _select(part, present)


def merge(parts: Sequence[Gathered]) -> Gathered:
    """Add up the facts of disjoint parts of a volume."""
    ids_all = np.concatenate([p.ids_N for p in parts])
    ids, position = np.unique(ids_all, return_inverse=True)
    order = np.argsort(position, kind="stable")
    first = np.flatnonzero(np.diff(position[order], prepend=-1))

    def reduced(name: str, how: np.ufunc) -> np.ndarray:
        values = np.concatenate([getattr(p, name) for p in parts])[order]
        return how.reduceat(values, first, axis=0) if len(values) else values

    return Gathered(
        ids_N=ids,
        voxels_N=reduced("voxels_N", np.add),
        sums_N3=reduced("sums_N3", np.add),
        products_N6=reduced("products_N6", np.add),
        low_N3=reduced("low_N3", np.minimum),
        high_N3=reduced("high_N3", np.maximum),
        crossings_ND=reduced("crossings_ND", np.add),
        grey_N=None if parts[0].grey_N is None else reduced("grey_N", np.add),
        contacts=tuple(add_pairs([p.contacts[axis] for p in parts]) for axis in range(3)),  # type: ignore[arg-type]
        classes=add_pairs([p.classes for p in parts]),
        hosts=add_pairs([p.hosts for p in parts]),
    )


def gather_all(
    inputs: Inputs, blocks: Sequence[Block], *, on_block: Callable[[int], None] = lambda _: None
) -> Gathered:
    """The facts of all objects. Memory: one block and a few hundred bytes per object.

    Args:
        blocks: cover the volume once.
        on_block: called with the number of finished blocks.
    """
    total: Gathered | None = None
    waiting: list[Gathered] = []
    for count, block in enumerate(blocks, 1):
        waiting.append(gather(inputs, block))
        # Merging costs as much as the objects known so far, so several blocks are merged at a time.
        if count == len(blocks) or sum(len(p.ids_N) for p in waiting) > (0 if total is None else len(total.ids_N)):
            total = merge(waiting if total is None else [total, *waiting])
            waiting = []
        on_block(count)
    assert total is not None
    return total


def _moments(core_ZYX: np.ndarray, count: int, block: Block, volume: Shape, image_ZYX: np.ndarray | None) -> Gathered:
    """Voxels, sums of coordinates and extents from the runs of equal labels along x."""
    height, width = core_ZYX.shape[1:]
    flat = core_ZYX.ravel()
    change = np.empty(flat.size, bool)
    change[0] = True
    np.not_equal(flat[1:], flat[:-1], out=change[1:])
    change[::width] = True
    starts = np.flatnonzero(change)
    lengths = np.diff(np.append(starts, flat.size))
    labels = flat[starts]
    grey = None
    if image_ZYX is not None:
        exact = image_ZYX.dtype.kind in "bui"
        run_grey = np.add.reduceat(image_ZYX.ravel(), starts, dtype=np.int64 if exact else np.float64)
        grey = np.zeros(count, run_grey.dtype)
        np.add.at(grey, labels, run_grey)
    inside = labels != 0
    starts, lengths, labels = starts[inside], lengths[inside], labels[inside]
    x0 = starts % width
    z, y = starts // (width * height), starts // width % height
    n = lengths.astype(np.int64)
    # Sums of x and of x * x over a run, in closed form, in the block's own coordinates: exact in float64.
    sum_x = n * x0 + n * (n - 1) // 2
    sum_xx = n * x0 * x0 + x0 * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6

    def added(values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, values, count).astype(np.int64)

    voxels = added(n)
    sums = np.stack([added(z * n), added(y * n), added(sum_x)], axis=1)
    own = [added(v) for v in (z * z * n, y * y * n, sum_xx, y * sum_x, z * sum_x, z * y * n)]
    offset = block.start
    # Python's integers where an object as large as the volume would overflow 64 bits.
    wide = np.int64 if max(volume) ** 2 * math.prod(volume) < _EXACT else object
    voxels_w, sums_w = voxels.astype(wide), sums.astype(wide)
    products = [
        p.astype(wide) + offset[a] * sums_w[:, b] + offset[b] * sums_w[:, a] + offset[a] * offset[b] * voxels_w
        for p, (a, b) in zip(own, _PRODUCTS, strict=True)
    ]
    low = np.full((count, 3), np.iinfo(np.int64).max)
    high = np.zeros((count, 3), np.int64)
    for axis, (first, last) in enumerate(((z, z + 1), (y, y + 1), (x0, x0 + n))):
        np.minimum.at(low[:, axis], labels, first + offset[axis])
        np.maximum.at(high[:, axis], labels, last + offset[axis])
    return Gathered(
        ids_N=np.empty(0),
        voxels_N=voxels,
        sums_N3=sums + voxels[:, None] * np.array(offset),
        products_N6=np.stack(products, axis=1),
        low_N3=low,
        high_N3=high,
        crossings_ND=np.empty((0, 0)),
        grey_N=grey,
    )


def _crossings(
    local_ZYX: np.ndarray, ids: np.ndarray, block: Block, volume: Shape
) -> tuple[np.ndarray, tuple[PairCounts, PairCounts, PairCounts]]:
    """Crossings [N, D] of lines with the objects' surfaces, and contacts of objects along z, y, x.

    A pair of voxels belongs to the block of its first voxel. Around the volume lies one layer of background, which
    belongs to the blocks that touch it.

    Args:
        local_ZYX: positions in `ids`, with a margin of 2 voxels around the block.
    """
    flat_image = volume[0] == 1
    directions = DIRECTIONS_2D if flat_image else DIRECTIONS_3D
    low = [2 - (a == 0) for a in block.start]
    high = [n - 2 + (b == v) for n, b, v in zip(local_ZYX.shape, block.stop, volume, strict=True)]
    if flat_image:
        low[0], high[0] = 2, 3
    first_ZYX = local_ZYX[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    crossings = np.zeros((len(ids), len(directions)), np.int64)
    contacts = [NO_PAIRS] * 3
    for number, step in enumerate(directions):
        moved = tuple(slice(a + s, b + s) for a, b, s in zip(low, high, step, strict=True))
        second_ZYX = local_ZYX[moved]
        differ = first_ZYX != second_ZYX
        first, second = first_ZYX[differ], second_ZYX[differ]
        crossings[:, number] = np.bincount(first, minlength=len(ids)) + np.bincount(second, minlength=len(ids))
        if step in _FACES:
            touching = (first != 0) & (second != 0)
            pair = np.sort(np.stack([ids[first[touching]], ids[second[touching]]], axis=1), axis=1)
            contacts[_FACES.index(step)] = sum_pairs(pair, np.ones(len(pair), np.int64))
    return crossings, (contacts[0], contacts[1], contacts[2])


def _overlaps(core_ZYX: np.ndarray, ids: np.ndarray, other_ZYX: np.ndarray) -> PairCounts:
    """Voxels of each object (by position in `ids`) with each value of another volume."""
    pairs = count_pairs(core_ZYX, other_ZYX)
    pairs = pairs.where(pairs.ids_N2[:, 0] != 0)
    return PairCounts(np.stack([ids[pairs.ids_N2[:, 0]], pairs.ids_N2[:, 1]], axis=1), pairs.counts_N)


def _select(part: Gathered, keep_N: np.ndarray) -> Gathered:
    names = ("ids_N", "voxels_N", "sums_N3", "products_N6", "low_N3", "high_N3", "crossings_ND")
    kept = {name: getattr(part, name)[keep_N] for name in names}
    return replace(part, grey_N=None if part.grey_N is None else part.grey_N[keep_N], **kept)


@dataclass(frozen=True)
class ObjectTable:
    """Measurements of N objects in physical units, in the order of their ids.

    Lengths are in `unit`, areas in its square, volumes in its cube; positions count from the outer corner of the first
    voxel. For a single section (`flat`) size is the area and border the perimeter, else volume and surface.

    Attributes:
        ids_N: uint64. class_N: class index, or -1 where unknown. voxels_N: number of voxels.
        size_N: area or volume. border_N: perimeter or surface by Crofton's formula, including cuts at the border of
            the volume.
        low_N3, high_N3: bounding box. centroid_N3: center of mass. centroid_voxel_N3: the same as a voxel index.
        diameter_N: of the circle or sphere of the same size.
        roundness_N: circularity 4 pi A / P^2, or sphericity pi^(1/3) (6 V)^(2/3) / S; 1 for circle and sphere, up to
            the error of the border.
        axes_N3: major, middle and minor axis: full axes of the ellipse or ellipsoid with the same second moments; the
            middle one is NaN for a single section.
        grey_N: mean of the image, NaN without one.
        touches_border_N: whether the object reaches the border of the volume; for a single section, of the image.
        neighbor_N, neighbor_distance_N: the nearest object of the same class and the distance of the centroids;
            0 and NaN when there is none.
        host_N: the enclosing object, 0 when there is none (see `table`).
    """

    unit: str
    flat: bool
    ids_N: np.ndarray
    class_N: np.ndarray
    voxels_N: np.ndarray
    size_N: np.ndarray
    border_N: np.ndarray
    low_N3: np.ndarray
    high_N3: np.ndarray
    centroid_N3: np.ndarray
    centroid_voxel_N3: np.ndarray
    diameter_N: np.ndarray
    roundness_N: np.ndarray
    axes_N3: np.ndarray
    grey_N: np.ndarray
    touches_border_N: np.ndarray
    neighbor_N: np.ndarray
    neighbor_distance_N: np.ndarray
    host_N: np.ndarray
    class_names: tuple[str, ...] = field(default=())

    def class_name(self, index: int) -> str:
        """Name of a class; its number where it has no name, "" where the class is unknown."""
        if index < 0:
            return ""
        return self.class_names[index] if index < len(self.class_names) else str(index)


def table(
    gathered: Gathered,
    volume: Shape,
    voxel: tuple[float, float, float],
    unit: str,
    *,
    class_of: dict[int, int] | None = None,
    class_names: Sequence[str] = (),
) -> ObjectTable:
    """The measurements that follow from the gathered facts.

    The class of an object is the one that most of its voxels have in the class map, else `class_of`. The enclosing
    object is the id that most of its voxels have in the second label volume, where that is given; otherwise the object
    of another class with which it shares most of its contact surface, if that is at least half of its own surface.

    Args:
        voxel: size along z, y, x in `unit`. For a single section z does not matter.
        class_of: class by id, for objects whose class is known without a class map.
    """
    n = gathered.voxels_N > 0
    g = gathered if n.all() else _select(gathered, n)
    flat = volume[0] == 1
    size = np.array((1.0, *voxel[1:]) if flat else voxel)
    count = g.voxels_N.astype(np.float64)
    mean_N3 = g.sums_N3.astype(np.float64) / count[:, None]
    class_N = _classes(g, class_of)
    measure_N = count * np.prod(size)
    weights = crossing_lengths(voxel[1:]) if flat else crossing_areas(voxel)
    border_N = g.crossings_ND @ weights
    centroid_N3 = (mean_N3 + 0.5) * size
    diameter = 2 * np.sqrt(measure_N / np.pi) if flat else np.cbrt(6 * measure_N / np.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        if flat:
            roundness = 4 * np.pi * measure_N / border_N**2
        else:
            roundness = np.cbrt(np.pi) * np.cbrt(6 * measure_N) ** 2 / border_N
    neighbor, distance = _nearest(g.ids_N, class_N, centroid_N3[:, 1:] if flat else centroid_N3)
    return ObjectTable(
        unit=unit,
        flat=flat,
        ids_N=g.ids_N,
        class_N=class_N,
        voxels_N=g.voxels_N,
        size_N=measure_N,
        border_N=border_N,
        low_N3=g.low_N3 * size,
        high_N3=g.high_N3 * size,
        centroid_N3=centroid_N3,
        centroid_voxel_N3=mean_N3,
        diameter_N=diameter,
        roundness_N=roundness,
        axes_N3=_axes(g, size, flat=flat),
        grey_N=np.full(len(count), np.nan) if g.grey_N is None else g.grey_N / count,
        touches_border_N=_touching(g, volume, flat=flat),
        neighbor_N=neighbor,
        neighbor_distance_N=distance,
        host_N=_hosts(g, class_N, size, flat=flat),
        class_names=tuple(class_names),
    )


def _classes(g: Gathered, class_of: dict[int, int] | None) -> np.ndarray:
    known = np.full(len(g.ids_N), -1, np.int64)
    if class_of:
        known = np.array([class_of.get(int(i), -1) for i in g.ids_N], np.int64)
    best = best_partner(g.classes)
    known[np.searchsorted(g.ids_N, best.ids_N2[:, 0])] = best.ids_N2[:, 1].astype(np.int64)
    return known


def _axes(g: Gathered, size: np.ndarray, *, flat: bool) -> np.ndarray:
    """Axes [N, 3] of the ellipsoids with the same second moments; a voxel counts as a box, not as a point."""
    count = g.voxels_N
    covariance = np.empty((len(count), 3, 3))
    for p, (a, b) in enumerate(_PRODUCTS):
        # Integers until the last step: a difference of large products would lose all digits in floats.
        exact = count.astype(object) * g.products_N6[:, p] - g.sums_N3[:, a].astype(object) * g.sums_N3[:, b]
        value = (exact / (count.astype(object) ** 2)).astype(np.float64) + (a == b) / 12
        covariance[:, a, b] = covariance[:, b, a] = value * size[a] * size[b]
    axes = np.full((len(count), 3), np.nan)
    if not len(count):
        return axes
    if flat:
        spread = np.linalg.eigvalsh(covariance[:, 1:, 1:])
        axes[:, 0], axes[:, 2] = 4 * np.sqrt(spread[:, 1]), 4 * np.sqrt(spread[:, 0])
    else:
        axes[:] = 2 * np.sqrt(5 * np.linalg.eigvalsh(covariance)[:, ::-1])
    return axes


def _touching(g: Gathered, volume: Shape, *, flat: bool) -> np.ndarray:
    first = 1 if flat else 0
    at_low = (g.low_N3[:, first:] == 0).any(axis=1)
    return np.asarray(at_low | (g.high_N3[:, first:] == np.array(volume)[first:]).any(axis=1))


def _nearest(ids_N: np.ndarray, class_N: np.ndarray, centroid_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    neighbor, distance = np.zeros(len(ids_N), np.uint64), np.full(len(ids_N), np.nan)
    for one in np.unique(class_N):
        own = np.flatnonzero(class_N == one)
        if len(own) < 2:
            continue
        gap, found = cKDTree(centroid_N3[own]).query(centroid_N3[own], k=2)
        # An object whose centroid coincides with another's may come second in its own list.
        itself = found[:, 0] == np.arange(len(own))
        column = np.where(itself, 1, 0)
        rows = np.arange(len(own))
        neighbor[own], distance[own] = ids_N[own[found[rows, column]]], gap[rows, column]
    return neighbor, distance


def _hosts(g: Gathered, class_N: np.ndarray, size: np.ndarray, *, flat: bool) -> np.ndarray:
    """The enclosing object of each object; 0 when there is none."""
    hosts = np.zeros(len(g.ids_N), np.uint64)
    if len(g.hosts.counts_N):
        best = best_partner(g.hosts)
        hosts[np.searchsorted(g.ids_N, best.ids_N2[:, 0])] = best.ids_N2[:, 1]
        return hosts
    # Voxel faces, weighted by their areas: those of each object, and those that pairs of other classes share.
    directions = DIRECTIONS_2D if flat else DIRECTIONS_3D
    face = np.prod(size) / size
    own_N = sum(
        g.crossings_ND[:, directions.index(step)] * face[a] for a, step in enumerate(_FACES) if step in directions
    )
    shared: dict[tuple[int, int], float] = {}
    for axis, pairs in enumerate(g.contacts):
        first, second = np.searchsorted(g.ids_N, pairs.ids_N2).T
        other = class_N[first] != class_N[second]
        faces = pairs.counts_N * face[axis]
        for a, b, area in zip(first[other].tolist(), second[other].tolist(), faces[other].tolist(), strict=True):
            for pair in ((a, b), (b, a)):
                shared[pair] = shared.get(pair, 0.0) + area
    best_area = np.zeros(len(hosts))
    for (a, b), area in sorted(shared.items()):
        if area >= 0.5 * own_N[a] and area > best_area[a] and g.voxels_N[b] > g.voxels_N[a]:
            hosts[a], best_area[a] = g.ids_N[b], area
    return hosts
