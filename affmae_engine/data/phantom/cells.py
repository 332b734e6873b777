"""Cell bodies of the phantom: which cell a point is in, how deep, and how steeply its membrane meets the section.

Unusual: a cell is the set of points whose additively weighted distance `|p - c| - r` to one of its balls is least
(an Apollonius diagram), which makes small profiles round and large ones bulge between them. Dividing the difference
of the two least distances by the length of its gradient gives the distance to the membrane in nm to first order, and
the gradient's z part says how obliquely the section cuts it. Glia is one more competitor, with a distance that
wanders in space, so it fills the larger gaps as thin sheets.

Axes: N balls or points, M cells, C warp components, K candidate balls, B blocks of pixels, P pixels of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from affmae_engine.data.phantom.noise import F32, SplineNoise
from affmae_engine.data.phantom.packing import F64, I32, Balls, pack

MARGIN_NM = 900.0
GLIA = 0  # cell id of glia
_CANDIDATES = 18
_BLOCK_NM = 40.0
_WARPS = ((700.0, 150.0), (230.0, 22.0), (80.0, 4.0))  # lattice step and displacement (rms), nm


@dataclass(frozen=True)
class CellPlane:
    """One section: cell_YX ids, depth_YX nm to the own membrane's midline, slope_YX |n_z| of the membrane normal,
    warped_CYX positions in packing space (nm), which textures follow so that they bend with the tissue."""

    cell_YX: I32
    depth_YX: F32
    slope_YX: F32
    warped_CYX: F32


class CellField:
    """Cells of one phantom. `cell_count` includes glia (id 0); `axis_M3` is each cell's long axis."""

    def __init__(self, rng: np.random.Generator, extent_nm: F64) -> None:
        low, high = np.full(3, -MARGIN_NM), extent_nm + MARGIN_NM
        # The warp may carry a point by about three times its rms beyond the box.
        self._warps = [(SplineNoise(rng, low, high, step, 3), np.float32(rms)) for step, rms in _WARPS]
        self._glia = SplineNoise(rng, low, high, 500.0)
        self._stretch_33 = _stretch(rng)
        corner_83 = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
        packed_83 = corner_83 @ self._stretch_33.T
        self.balls: Balls = pack(rng, packed_83.min(0), packed_83.max(0))
        self.cell_count = int(self.balls.cell_N.max()) + 1
        self.axis_M3 = _long_axes(rng, self.balls, self.cell_count, self._stretch_33)
        self._largest = float(self.balls.radius_N.max())
        lift_N = np.sqrt(self._largest**2 - self.balls.radius_N**2)
        # In one more dimension the nearest lifted centre is the ball of least power distance.
        self._tree = cKDTree(np.column_stack([self.balls.centre_N3, lift_N]))
        self._centre_N3 = self.balls.centre_N3.astype(np.float32)
        self._radius_N = self.balls.radius_N.astype(np.float32)

    def _candidates(self, point_N3: NDArray[np.floating]) -> NDArray[np.intp]:
        lifted = np.column_stack([point_N3, np.zeros(len(point_N3))])
        # A list of ranks keeps the second axis even for one rank or no point.
        _, index_NK = self._tree.query(lifted, k=np.arange(1, min(_CANDIDATES, self._tree.n) + 1))
        return np.asarray(index_NK, dtype=np.intp)

    def _compete(self, point_BP3: F32, index_BK: NDArray[np.intp], glia_BP: F32) -> tuple[I32, F32, F32]:
        """Cell, depth and slope (B, P) of points that share their block's candidate balls."""
        best = glia_BP.copy()
        second = np.full_like(best, np.float32(1e6))
        best_ball = np.full(best.shape, -1, dtype=np.int32)
        second_ball = np.full(best.shape, -1, dtype=np.int32)
        best_cell = np.full(best.shape, GLIA, dtype=np.int32)
        for k in range(index_BK.shape[1]):
            ball_B = index_BK[:, k]
            offset = point_BP3 - self._centre_N3[ball_B][:, None]
            reach = np.sqrt(np.einsum("bpc,bpc->bp", offset, offset)) - self._radius_N[ball_B][:, None]
            cell = np.broadcast_to(self.balls.cell_N[ball_B][:, None], best.shape)
            ball = np.broadcast_to(ball_B[:, None].astype(np.int32), best.shape)
            wins = reach < best
            demoted = wins & (cell != best_cell)
            np.copyto(second, best, where=demoted)
            np.copyto(second_ball, best_ball, where=demoted)
            runner = ~wins & (reach < second) & (cell != best_cell)
            np.copyto(second, reach, where=runner)
            np.copyto(second_ball, ball, where=runner)
            np.copyto(best, reach, where=wins)
            np.copyto(best_ball, ball, where=wins)
            np.copyto(best_cell, cell, where=wins)
        gradient = self._outward(point_BP3, second_ball) - self._outward(point_BP3, best_ball)
        gradient = gradient @ self._stretch_33.astype(np.float32)  # chain rule: back to physical space
        length = np.sqrt(np.einsum("bpc,bpc->bp", gradient, gradient))
        steep = np.maximum(length, np.float32(0.6))  # where both fields rise alike the first order says nothing
        slope = np.abs(gradient[..., 0]) / np.maximum(length, np.float32(1e-3))
        return best_cell, (second - best) / steep, slope

    def _outward(self, point_BP3: F32, ball_BP: I32) -> F32:
        """Unit vectors from the named balls (none for glia, -1) to the points."""
        offset = point_BP3 - self._centre_N3[ball_BP]
        length = np.sqrt(np.einsum("bpc,bpc->bp", offset, offset)) + np.float32(1e-3)
        return offset * ((ball_BP >= 0) / length)[..., None].astype(np.float32)

    def plane(self, z_nm: float, y_nm: F64, x_nm: F64) -> CellPlane:
        """The section at height z_nm; y_nm (Y,) and x_nm (X,) are its evenly spaced pixel centres in nm."""
        block_y, block_x = _block(y_nm), _block(x_nm)
        y_pad, x_pad = _pad(y_nm, block_y), _pad(x_nm, block_x)
        warped = np.empty((3, len(y_pad), len(x_pad)), dtype=np.float32)
        warped[0], warped[1], warped[2] = np.float32(z_nm), y_pad[:, None], x_pad[None]
        for noise, rms in self._warps:
            warped += rms * noise.grid(z_nm, y_pad, x_pad)
        warped = np.einsum("dc,cyx->dyx", self._stretch_33.astype(np.float32), warped)
        glia = _glia_reach(self._glia.grid(z_nm, y_pad, x_pad)[0])
        cell, depth, slope = (np.empty(warped.shape[1:], dtype=t) for t in (np.int32, np.float32, np.float32))
        rows = max(1, int(40_000 / (len(x_pad) * block_y))) * block_y
        for top in range(0, len(y_pad), rows):
            band = slice(top, min(top + rows, len(y_pad)))
            point = _to_blocks(np.moveaxis(warped[:, band], 0, -1), block_y, block_x)
            index = self._candidates(point[:, point.shape[1] // 2])
            found = self._compete(point, index, _to_blocks(glia[band, :, None], block_y, block_x)[..., 0])
            for plane, values in zip((cell, depth, slope), found, strict=True):
                plane[band] = _from_blocks(values, plane[band].shape, block_y, block_x)
        inside = (slice(len(y_nm)), slice(len(x_nm)))
        return CellPlane(cell[inside], depth[inside], slope[inside], warped[:, *inside])

    def at(self, point_N3: F64) -> tuple[I32, F32]:
        """Cell id and depth (nm) at points (N, 3) in nm."""
        warped = point_N3.astype(np.float32).T.copy()
        for noise, rms in self._warps:
            warped += rms * noise.at(point_N3)
        packed = warped.T @ self._stretch_33.T.astype(np.float32)
        glia = _glia_reach(self._glia.at(point_N3)[0])
        cell, depth, _ = self._compete(packed[:, None], self._candidates(packed), glia[:, None])
        return cell[:, 0], depth[:, 0]

    def near(self, extent_nm: F64, reach_nm: float) -> NDArray[np.bool_]:
        """Which balls (N,) lie within `reach_nm` of the volume before the warp."""
        plain_N3 = self.balls.centre_N3 @ np.linalg.inv(self._stretch_33).T
        return np.asarray(np.all((plain_N3 > -reach_nm) & (plain_N3 < extent_nm + reach_nm), axis=1))

    def physical(self, packed_N3: F64) -> F64:
        """Points (N, 3) of packing space taken back to nm; the warp is inverted by fixed-point iteration."""
        target = packed_N3 @ np.linalg.inv(self._stretch_33).T
        point = target
        for _ in range(4):
            point = target - sum(rms * noise.at(point).T.astype(np.float64) for noise, rms in self._warps)
        return point


def _glia_reach(noise: F32) -> F32:
    """Distance (nm) from every ball beyond which glia takes over: little in few places, unreachable in most."""
    return np.maximum(np.float32(60) + np.float32(45) * noise, np.float32(14))


def _stretch(rng: np.random.Generator) -> F64:
    """Linear map to packing space: tissue is drawn out 1.5 times along an axis not far from z, as in a tract."""
    axis = np.array([1.0, *rng.normal(0, 0.45, 2)])
    axis /= np.linalg.norm(axis)
    return np.eye(3) + (1 / 1.5 - 1) * np.outer(axis, axis)


def _long_axes(rng: np.random.Generator, balls: Balls, cells: int, stretch_33: F64) -> F64:
    """Unit long axis of each cell (M, 3) in packing space: the principal direction of its balls, blurred."""
    total_M3 = np.stack([np.bincount(balls.cell_N, balls.centre_N3[:, a], cells) for a in range(3)], -1)
    count_M = np.maximum(np.bincount(balls.cell_N, minlength=cells), 1).astype(np.float64)
    offset = balls.centre_N3 - (total_M3 / count_M[:, None])[balls.cell_N]
    cov = np.zeros((cells, 3, 3))
    np.add.at(cov, balls.cell_N, offset[:, :, None] * offset[:, None])
    pull = np.linalg.inv(stretch_33) @ np.array([1.0, 0, 0])
    cov += 120.0**2 * np.outer(pull, pull)  # a lone ball follows the tract
    axis = np.linalg.eigh(cov)[1][:, :, -1] + rng.normal(0, 0.08, (cells, 3))
    return np.asarray(axis / np.linalg.norm(axis, axis=1, keepdims=True))


def _block(position_nm: F64) -> int:
    """Pixels per block along one axis."""
    step = float(position_nm[1] - position_nm[0]) if len(position_nm) > 1 else _BLOCK_NM
    return int(np.clip(round(_BLOCK_NM / step), 1, max(1, len(position_nm))))


def _pad(position_nm: F64, block: int) -> F64:
    """The positions continued at their spacing to a whole number of blocks."""
    extra = -len(position_nm) % block
    step = position_nm[1] - position_nm[0] if len(position_nm) > 1 else 0.0
    return np.concatenate([position_nm, position_nm[-1] + step * np.arange(1, extra + 1)])


def _to_blocks(plane_YXC: F32, block_y: int, block_x: int) -> F32:
    """(Y, X, C) to (B, P, C)."""
    y, x, c = plane_YXC.shape
    split = plane_YXC.reshape(y // block_y, block_y, x // block_x, block_x, c).swapaxes(1, 2)
    return np.ascontiguousarray(split).reshape(-1, block_y * block_x, c)


def _from_blocks(
    values_BP: NDArray[np.generic], shape_YX: tuple[int, ...], block_y: int, block_x: int
) -> NDArray[np.generic]:
    """(B, P) back to (Y, X)."""
    y, x = shape_YX
    split = values_BP.reshape(y // block_y, x // block_x, block_y, block_x)
    return split.swapaxes(1, 2).reshape(y, x)
