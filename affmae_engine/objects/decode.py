"""The decoders: what is computed inside one block on the way from maps to objects.

`components`: objects are the connected components of a kind (voxels that share a face), for objects that lie apart.

`watershed`: touching objects are divided. Seeds are the connected components of voxels that lie at least
`seed_distance` inside an object; from them a watershed floods the kind's voxels along the boundary map and the distance
to boundaries. Foreground that no flood reaches becomes objects of its own. What was divided at a wide connection is
joined again (`join_neck`): between a varicosity and the rest of a neurite, not at a leak in a membrane.

Both work in three dimensions, or section by section (`sections`), which is followed by linking (`link.py`). A block is
computed with a halo. Distances are exact because they are cut off below the halo; connected components are exact
because parts of them are joined across the faces of blocks (`merge.py`); the watershed alone sees no further than the
halo. Every voxel value of a block's result is the number of a piece, 1 to n in that block.

Axes: Z Y X, N pieces, 3 is z y x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage
from skimage.measure import label
from skimage.segmentation import watershed

from affmae_engine.errors import ConfigError
from affmae_engine.objects.blocks import Block, Shape
from affmae_engine.objects.job import Pass
from affmae_engine.objects.maps import MapReader
from affmae_engine.objects.pairs import compact

CONTEXT = 16
"""Voxels of halo beyond the reach of distances, for the watershed."""


@dataclass(frozen=True)
class DecodeOptions:
    """How objects are made. Lengths are in pixels (the shortest edge of a voxel).

    Attributes:
        method: see the module.
        sections: section by section, then linked; otherwise in three dimensions.
        foreground: threshold of a kind's probability. boundary: threshold of the boundary map.
        seed_distance: seeds lie at least this far from boundary and background.
        boundary_weight: share of the boundary map, against the distance, in what the watershed climbs.
        join_neck: two floods are one object where the connection between them is at least this thick, relative to the
            thinner one; 1 joins nothing.
        link_iou, link_overlap: sections of an object are linked at this IoU, or where this share of the smaller one is
            covered. bridge: sections that may be missing in between.
        min_voxels, min_span: objects of fewer voxels or fewer sections are removed.
        fill_holes: fill cavities (by section: holes in a section) that one object encloses.
    """

    method: Literal["components", "watershed"] = "watershed"
    sections: bool = False
    foreground: float = 0.5
    boundary: float = 0.5
    seed_distance: float = 3.0
    boundary_weight: float = 0.8
    join_neck: float = 0.75
    link_iou: float = 0.3
    link_overlap: float = 0.7
    bridge: int = 1
    min_voxels: int = 20
    min_span: int = 1
    fill_holes: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError when a value is out of range."""
        shares = ("foreground", "boundary", "boundary_weight", "join_neck", "link_iou", "link_overlap")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which is not within 0 and 1")
        if not 0.5 <= self.seed_distance <= 64:
            raise ConfigError(f"seed_distance is {self.seed_distance}, which is not within 0.5 and 64 pixels")
        if self.min_voxels < 1 or self.min_span < 1 or not 0 <= self.bridge <= 8:
            raise ConfigError("min_voxels and min_span are at least 1, bridge is 0 to 8")

    @property
    def distance_cap(self) -> float:
        """Distances beyond this are not told apart; pixels."""
        return 2 * self.seed_distance + 2


@dataclass(frozen=True)
class Decoding:
    """Everything that the functions of a block need; can be pickled.

    Attributes:
        voxel: edges of a voxel relative to the shortest one, along z, y, x.
    """

    maps: MapReader
    options: DecodeOptions
    voxel: tuple[float, float, float]

    @property
    def reach(self) -> Shape:
        """Voxels along each axis within which distances are exact."""
        z, y, x = (math.ceil(self.options.distance_cap / edge) + 1 for edge in self.voxel)
        return (0 if self.options.sections else z), y, x

    def components(self, block: Block) -> dict[str, np.ndarray]:
        """Pieces of the connected components of each kind."""
        kinds = self.maps.kinds(*block.window, self.options.foreground)
        labels = connected(kinds, sections=self.options.sections)
        return pieces(labels, kinds, block, self.maps.shape)

    def seeds(self, block: Block) -> dict[str, np.ndarray]:
        """Pieces of the seeds."""
        window, inner = block.with_halo(self.reach, self.maps.shape)
        kinds = self.maps.kinds(*window, self.options.foreground)
        distance = self.distance(kinds, window)[inner]
        seeds = np.where(distance >= self.options.seed_distance, kinds[inner], 0).astype(np.uint8)
        labels = connected(seeds, sections=self.options.sections)
        return pieces(labels, seeds, block, self.maps.shape)

    def distance(self, kinds: np.ndarray, window: tuple[slice, slice, slice]) -> np.ndarray:
        """Distance to the nearest boundary or other kind, float32 pixels, cut off at `distance_cap`.

        The predicted map where there is one. Otherwise measured; the border of the volume is no boundary.
        """
        cap = np.float32(self.options.distance_cap)
        inside = kinds > 0
        predicted = self.maps.distance(*window)
        if predicted is not None:
            return np.where(inside, np.minimum(predicted, cap), 0).astype(np.float32)
        boundary = self.maps.boundary(*window)
        if boundary is not None:
            inside &= boundary < self.options.boundary
        distance = np.zeros(kinds.shape, np.float32)
        for kind in np.unique(kinds[inside]).tolist():
            own = inside & (kinds == kind)
            if self.options.sections:
                for section, result in zip(own, distance, strict=True):
                    result += _distance(section, self.voxel[1:], cap)
            else:
                distance += _distance(own, self.voxel, cap)
        return distance


@dataclass(frozen=True)
class Flood:
    """The watershed of a block, from seeds that are known over the whole volume.

    Attributes:
        seeds: the pass that made the pieces of seeds. seed_of_piece: number of the seed by piece of the volume, and
            first_piece: position of each block's first piece in it.
    """

    decoding: Decoding
    seeds: Pass
    seed_of_piece: np.ndarray
    first_piece: np.ndarray

    def __call__(self, block: Block) -> dict[str, np.ndarray]:
        d, volume = self.decoding, self.decoding.maps.shape
        halo = tuple(r + CONTEXT if r else 0 for r in d.reach)
        window, inner = block.with_halo(halo, volume)  # type: ignore[arg-type]  # three of each
        kinds = d.maps.kinds(*window, d.options.foreground)
        seeds = self.seeds.read(*window, table=self._seed_numbers)
        numbers, markers = compact(seeds)
        flooded = np.zeros(kinds.shape, np.int32)
        distance = d.distance(kinds, window)
        if len(numbers) > 1:
            land = self._landscape(distance, window)
            for kind in np.unique(kinds[kinds > 0]).tolist():
                own = kinds == kind
                _flood(land, np.where(own, markers, 0), own, flooded, sections=d.options.sections)
        kinds, flooded = kinds[inner], flooded[inner]
        # Pieces 1..k belong to seeds, the others to what no flood reached.
        present, labels = compact(flooded)
        left = connected(np.where(flooded == 0, kinds, 0).astype(np.uint8), sections=d.options.sections)
        known = len(present) - 1
        labels = np.where(left > 0, left + known, labels)
        result = pieces(labels, kinds, block, volume)
        result["seed"] = np.zeros(len(result["kind"]), np.int64)
        result["seed"][:known] = numbers[present[1:].astype(np.int64)].astype(np.int64)
        return result | necks(labels, kinds, distance[inner], sections=d.options.sections)

    def _seed_numbers(self, index: int) -> np.ndarray:
        first, stop = self.first_piece[index : index + 2]
        return np.concatenate([np.zeros(1, np.int64), self.seed_of_piece[first:stop]])

    def _landscape(self, distance: np.ndarray, window: tuple[slice, slice, slice]) -> np.ndarray:
        """What the watershed climbs: boundary probability and nearness to boundaries, weighted; 0 to 1."""
        d = self.decoding
        near = 1 - distance / np.float32(d.options.distance_cap)
        boundary = d.maps.boundary(*window)
        if boundary is None:
            return near
        weight = np.float32(d.options.boundary_weight)
        return weight * boundary + (1 - weight) * near


def connected(kinds: np.ndarray, *, sections: bool) -> np.ndarray:
    """Number the connected components (shared faces) of equal values other than 0; int32, in raster order."""
    if not sections:
        return np.asarray(label(kinds, background=0, connectivity=1), np.int32)
    result = np.zeros(kinds.shape, np.int32)
    count = 0
    for z, section in enumerate(kinds):
        found, number = label(section, background=0, connectivity=1, return_num=True)
        result[z] = np.where(found > 0, found + count, 0)
        count += number
    return result


def pieces(labels: np.ndarray, kinds: np.ndarray, block: Block, volume: Shape) -> dict[str, np.ndarray]:
    """The result of a block: its voxels, and a table of its pieces.

    Args:
        labels: 0, and 1..n for the pieces, each with at least one voxel.
        kinds: value of every voxel; equal over a piece.

    Returns:
        voxels (uint32), the six faces of these by name ("z0", "z1", "y0", ...), and for the pieces: kind uint8, count,
        first (index of the first voxel in the volume, in raster order), low_N3 and high_N3 (extent), int64.
    """
    flat = labels.ravel()
    width = labels.shape[2]
    change = np.empty(flat.size, bool)
    change[0] = True
    np.not_equal(flat[1:], flat[:-1], out=change[1:])
    change[::width] = True
    starts = np.flatnonzero(change)
    lengths = np.diff(np.append(starts, flat.size))
    keep = flat[starts] > 0
    starts, lengths = starts[keep], lengths[keep]
    piece = flat[starts] - 1
    z, rest = np.divmod(starts, labels.shape[1] * width)
    y, x = np.divmod(rest, width)
    position = (z + block.start[0], y + block.start[1], x + block.start[2])
    count = int(flat.max(initial=0))
    low, high = np.full((count, 3), np.iinfo(np.int64).max), np.zeros((count, 3), np.int64)
    for axis, (first, last) in enumerate(
        zip(position, (position[0], position[1], position[2] + lengths - 1), strict=True)
    ):
        np.minimum.at(low[:, axis], piece, first)
        np.maximum.at(high[:, axis], piece, last + 1)
    first_voxel = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first_voxel, piece, (position[0] * volume[1] + position[1]) * volume[2] + position[2])
    kind = np.zeros(count, np.uint8)
    kind[piece] = kinds.ravel()[starts]
    voxels = labels.astype(np.uint32)
    return {
        "voxels": voxels,
        **faces(voxels),
        "kind": kind,
        "count": np.bincount(piece, lengths, count).astype(np.int64),
        "first": first_voxel,
        "low": low,
        "high": high,
    }


def necks(labels: np.ndarray, kinds: np.ndarray, distance: np.ndarray, *, sections: bool) -> dict[str, np.ndarray]:
    """How thick the connections between the pieces of a block are, as distances to the boundary.

    Returns:
        peak [N] of each piece; neck_pairs [E, 2] (pieces from 1 that share faces, lower one first) and necks [E], the
        highest of the lower distances on both sides of a shared face; and the faces of the distances, "distance_z0" ...
    """
    count = int(labels.max(initial=0))
    peak = np.asarray(ndimage.maximum(distance, labels, np.arange(1, count + 1)), np.float32).reshape(count)
    keys, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for axis in range(1 if sections else 0, 3):
        piece, kind, depth = (np.moveaxis(a, axis, 0) for a in (labels, kinds, distance))
        meet = (piece[:-1] != piece[1:]) & (piece[:-1] > 0) & (piece[1:] > 0) & (kind[:-1] == kind[1:])
        a, b = piece[:-1][meet].astype(np.int64), piece[1:][meet].astype(np.int64)
        keys.append(np.minimum(a, b) * (count + 1) + np.maximum(a, b))
        values.append(np.minimum(depth[:-1][meet], depth[1:][meet]))
    key, position = np.unique(np.concatenate(keys), return_inverse=True)
    highest = np.zeros(len(key), np.float32)
    np.maximum.at(highest, position, np.concatenate(values))
    pairs = np.stack([key // (count + 1), key % (count + 1)], axis=1)
    return {"peak": peak, "neck_pairs": pairs, "necks": highest, **faces(distance, "distance_")}


def faces(voxels: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
    """The first and last layers along each axis, as z0, z1, y0, y1, x0, x1 after `prefix`."""
    return {f"{prefix}{'zyx'[a]}{end}": np.take(voxels, -end, axis=a) for a in range(3) for end in (0, 1)}


def _distance(inside: np.ndarray, edges: tuple[float, ...], cap: np.float32) -> np.ndarray:
    """Distance of each voxel that is inside to the nearest that is not, up to `cap`."""
    result = np.zeros(inside.shape, np.float32)
    # The nearest voxel outside lies no further than one voxel beyond the extent of what is inside.
    (extent,) = ndimage.find_objects(inside.view(np.uint8)) or [None]
    if extent is None:
        return result
    wide = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in extent)
    own = inside[wide]
    if own.all():
        result[wide] = cap
    else:
        result[wide] = np.minimum(ndimage.distance_transform_edt(own, sampling=edges), cap)
    return result


def _flood(land: np.ndarray, markers: np.ndarray, own: np.ndarray, result: np.ndarray, *, sections: bool) -> None:
    """Watershed of one kind, written into `result` where it is."""
    if not sections:
        if markers.any():
            result[own] = watershed(land, markers, mask=own)[own]
        return
    for z in range(len(land)):
        if markers[z].any():
            result[z][own[z]] = watershed(land[z], markers[z], mask=own[z])[own[z]]
