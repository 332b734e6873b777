"""What the cells contain: mitochondria, vesicles and synapses, placed once in space and asked for section by section.

Unusual: everything keeps its distance from the membrane by the cell field's own depth, so mitochondria flatten
against the wall of a narrow neurite instead of poking through it. Placement happens in physical nm and depends on the
seed and the extent only, never on the pixel grid.

Axes: V vesicles, P points of a path, N points, 3 is z y x.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from affmae_engine.data.phantom.cells import GLIA, CellField, CellPlane
from affmae_engine.data.phantom.noise import F32
from affmae_engine.data.phantom.packing import F64, I32

# How far outside the imaged volume a ball may lie that is still given contents (nm); the warp moves it further.
_REACH_NM = 600.0
# Distance that organelles keep from the midline between two cells (nm).
CLEARANCE_NM = 34.0
_MITOCHONDRIA_SHARE = 0.62
_BOUTON_SHARE = 0.3


@dataclass(frozen=True)
class Mitochondrion:
    """A bent sausage: path_P3 and radius in nm; cristae lie across `crista_3` (unit vector) every `period` nm."""

    cell: int
    path_P3: F64
    radius: float
    crista_3: F64
    period: float
    darkness: float


@dataclass(frozen=True)
class Vesicles:
    """Spheres: centre_V3 and radius_V in nm, owner cell_V, and core_V, whether the core is dense."""

    centre_V3: F64
    radius_V: F64
    cell_V: I32
    core_V: np.ndarray


@dataclass(frozen=True)
class Organelles:
    """All organelles near the volume; synapse_S3 are points on membranes where dense material sits."""

    mitochondria: list[Mitochondrion]
    vesicles: Vesicles
    synapse_S3: F64


def populate(rng: np.random.Generator, cells: CellField, extent_nm: F64) -> Organelles:
    """Fill the cells that reach into the volume `[0, extent_nm]` (z y x)."""
    balls = cells.balls
    near_N = np.flatnonzero(cells.near(extent_nm, _REACH_NM))
    centre_N3 = cells.physical(balls.centre_N3[near_N])
    mitochondria: dict[int, list[Mitochondrion]] = {}
    clusters: list[tuple[F64, F64, I32, np.ndarray]] = []
    synapses: list[F64] = []
    for ball, centre in zip(near_N.tolist(), centre_N3, strict=True):
        radius, cell = float(balls.radius_N[ball]), int(balls.cell_N[ball])
        draw = rng.random(2)
        if radius > 135 and draw[0] < _MITOCHONDRIA_SHARE:
            for _ in range(1 + 2 * int(radius > 300) + 2 * int(radius > 480)):
                body = _mitochondrion(rng, cells.axis_M3[cell], cell, centre, radius)
                neighbours = mitochondria.setdefault(cell, [])
                if all(_apart(body, other) for other in neighbours):
                    neighbours.append(body)
        if radius > 120 and draw[1] < _BOUTON_SHARE:
            cluster, synapse = _bouton(rng, cells, cell, centre, radius)
            clusters.append(cluster)
            synapses.append(synapse)
    clusters.append(_scattered(rng, cells, extent_nm))
    merged = [np.concatenate(parts) for parts in zip(*clusters, strict=True)]
    free = _clear_of(merged[0], merged[1], merged[2], mitochondria)
    centre_V3, radius_V, cell_V, core_V = (part[free] for part in merged)
    vesicles = Vesicles(centre_V3, radius_V, cell_V.astype(np.int32), core_V.astype(bool))
    bodies = [body for neighbours in mitochondria.values() for body in neighbours]
    return Organelles(bodies, vesicles, np.concatenate([np.empty((0, 3)), *synapses]))


def _mitochondrion(rng: np.random.Generator, axis_3: F64, cell: int, centre: F64, ball: float) -> Mitochondrion:
    """A path of five points that starts near the ball's centre and roughly follows the neurite."""
    radius = min(rng.uniform(95, 230), 0.8 * ball)
    start = centre + rng.normal(0, 0.28, 3) * max(ball - radius, 0) * 1.3
    way = axis_3 + rng.normal(0, 0.5, 3)
    half = rng.uniform(0.0, 380.0)
    steps = np.linspace(-half, half, 5)[:, None] * (way / np.linalg.norm(way))
    bend = np.linspace(-1, 1, 5)[:, None] ** 2 * rng.normal(0, 0.22 * half, 3)
    crista = np.cross(way, rng.normal(size=3)) if rng.random() < 0.6 else way
    crista = crista * np.array([0.2, 1, 1])  # lamellae seen on edge are those that one notices
    return Mitochondrion(
        cell, start + steps + bend, radius, crista / np.linalg.norm(crista), rng.uniform(34, 58), rng.uniform(0.8, 1.2)
    )


def _apart(first: Mitochondrion, second: Mitochondrion) -> bool:
    """Whether two mitochondria of one cell leave room between them; two never fuse."""
    gap = np.linalg.norm(first.path_P3[:, None] - second.path_P3[None], axis=-1).min()
    return bool(gap > 1.15 * (first.radius + second.radius) + 40)


def _clear_of(centre_V3: F64, radius_V: F64, cell_V: I32, mitochondria: dict[int, list[Mitochondrion]]) -> np.ndarray:
    """Which vesicles (V,) touch no mitochondrion."""
    free = np.ones(len(centre_V3), dtype=bool)
    for cell, bodies in mitochondria.items():
        own = np.flatnonzero(cell_V == cell)
        for body in bodies if len(own) else []:
            distance, _ = _distance(centre_V3[None, own].astype(np.float32), body.path_P3.astype(np.float32))
            free[own[distance[0] < 1.12 * body.radius + radius_V[own] + 6]] = False
    return free


def _bouton(
    rng: np.random.Generator, cells: CellField, cell: int, centre: F64, radius: float
) -> tuple[tuple[F64, F64, I32, np.ndarray], F64]:
    """Clear vesicles crowded near one spot of the cell's membrane, and that spot (0 or 1, 3)."""
    way = rng.normal(size=3)
    way /= np.linalg.norm(way)
    ray_N3 = centre + way * np.arange(0.0, 2.2 * radius, 8.0)[:, None]
    cell_N, depth_N = cells.at(ray_N3)
    outside = np.flatnonzero((cell_N != cell) | (depth_N < 10))
    spot = ray_N3[outside[0]] if len(outside) and outside[0] > 0 else centre + way * radius
    count = int(np.clip(rng.lognormal(4.4, 0.6), 16, 300))
    spread = 38.0 * count ** (1 / 3)
    where_N3 = spot + rng.normal(0, spread, (6 * count, 3))
    kept = _spaced(where_N3, _inside(cells, where_N3, cell, CLEARANCE_NM + 8), 46.0)[:count]
    core = rng.random(len(kept)) < 0.04
    size = rng.normal(22.5, 1.8, len(kept)) + 10 * core
    spots = spot[None] if len(outside) and outside[0] > 0 else np.empty((0, 3))
    return (where_N3[kept], size, np.full(len(kept), cell), core), spots


def _scattered(rng: np.random.Generator, cells: CellField, extent_nm: F64) -> tuple[F64, F64, I32, np.ndarray]:
    """Lone vesicles, dense-core vesicles and larger endosomes all over the tissue."""
    low, high = -np.full(3, 100.0), extent_nm + 100.0
    count = rng.poisson(26e-9 * float(np.prod(high - low)))
    where_N3 = rng.uniform(low, high, (count, 3))
    core = rng.random(count) < 0.25
    size = np.where(core, rng.normal(36, 4, count), rng.normal(23, 3, count))
    endosome = ~core & (rng.random(count) < 0.22)
    size = np.where(endosome, rng.uniform(35, 75, count), size).clip(15)
    cell_N, depth_N = cells.at(where_N3)
    fits = (cell_N != GLIA) & (depth_N > size + 18)
    kept = _spaced(where_N3, fits, 110.0)
    return where_N3[kept], size[kept], cell_N[kept], core[kept]


def _inside(cells: CellField, where_N3: F64, cell: int, depth_nm: float) -> np.ndarray:
    cell_N, depth_N = cells.at(where_N3)
    return np.asarray((cell_N == cell) & (depth_N > depth_nm))


def _spaced(where_N3: F64, fits_N: np.ndarray, apart_nm: float) -> np.ndarray:
    """Indices of points that fit and keep `apart_nm` from the ones before."""
    index = np.flatnonzero(fits_N)
    keep = np.ones(len(index), dtype=bool)
    if len(index) > 1:
        pairs = cKDTree(where_N3[index]).query_pairs(apart_nm, output_type="ndarray")
        for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
            if keep[first]:
                keep[second] = False
    return index[keep]


def span(position_nm: F64, low: float, high: float) -> slice:
    """The indices of sorted positions that lie within [low, high)."""
    first, stop = np.searchsorted(position_nm, [low, high]).tolist()
    return slice(first, stop)


@dataclass(frozen=True)
class MitoView:
    """A mitochondrion in one section, in the window [rows, columns]: inside_YX is nm within the outer membrane
    (negative outside), slope_YX the |n_z| of its surface, phase_YX the position across its cristae in nm."""

    body: Mitochondrion
    rows: slice
    columns: slice
    inside_YX: F32
    slope_YX: F32
    phase_YX: F32


def cut_mitochondrion(
    body: Mitochondrion, plane: CellPlane, wobble_CYX: F32, z_nm: float, y_nm: F64, x_nm: F64
) -> MitoView | None:
    """The section at z_nm of one mitochondrion, or None when it lies elsewhere.

    `wobble_CYX` (3, Y, X) is smooth unit noise that dents the surface and makes the cristae wavy.
    """
    reach = body.radius * 1.5
    low, high = body.path_P3.min(0) - reach, body.path_P3.max(0) + reach
    if not low[0] < z_nm < high[0]:
        return None
    rows = span(y_nm, low[1], high[1])
    columns = span(x_nm, low[2], high[2])
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    window = (rows, columns)
    point = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), dtype=np.float32)
    point[..., 0], point[..., 1], point[..., 2] = z_nm, y_nm[rows, None], x_nm[None, columns]
    best, normal_z = _distance(point, body.path_P3.astype(np.float32))
    wobble = wobble_CYX[:, rows, columns]
    inside = np.float32(body.radius) * (1 + np.float32(0.09) * wobble[0]) - best
    inside = np.minimum(inside, plane.depth_YX[window] - np.float32(CLEARANCE_NM))
    inside = np.where(plane.cell_YX[window] == body.cell, inside, np.float32(-1e3))
    if not (inside > -30).any():
        return None
    phase = (point - body.path_P3[2].astype(np.float32)) @ body.crista_3.astype(np.float32)
    phase = phase + np.float32(13) * wobble[1] + np.float32(0.06) * body.radius * wobble[2]
    return MitoView(body, rows, columns, inside.astype(np.float32), normal_z, phase.astype(np.float32))


def _distance(point_YX3: F32, path_P3: F32) -> tuple[F32, F32]:
    """Distance to a polyline and |z part| of its direction, both (Y, X)."""
    best = np.full(point_YX3.shape[:2], np.float32(1e9))
    normal_z = np.zeros_like(best)
    for start, stop in itertools.pairwise(path_P3):
        along = stop - start
        t = np.clip(((point_YX3 - start) @ along) / max(float(along @ along), 1e-6), 0, 1)
        offset = point_YX3 - start - t[..., None] * along
        distance = np.sqrt(np.einsum("yxc,yxc->yx", offset, offset))
        nearer = distance < best
        best = np.where(nearer, distance, best)
        normal_z = np.where(nearer, np.abs(offset[..., 0]) / (distance + 1), normal_z)
    return best, normal_z.astype(np.float32)
