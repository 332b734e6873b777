"""Surface and perimeter of objects by Crofton's formula: lines through the volume are counted where they cross.

The surface of a body is twice the mean, over all directions, of the area that it shows to parallel lines, counted
once per crossing (Crofton 1868; discrete form: Legland, Kieu and Devaux 2007, Image Analysis and Stereology 26:83).
Lines run along the 13 directions to the 26 neighbors of a voxel (in 2-D: 4 directions to 8 neighbors). Each direction
weighs as much as the part of the sphere that is nearest to it, which accounts for anisotropic voxels. Crossings are
pairs of neighboring voxels, hence integers that add up over blocks exactly.

Unlike counting voxel faces, which makes a sphere's surface 1.5 times too large, the error for smooth bodies is a few
percent. Axes: D directions, 3 is z y x.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.spatial import SphericalVoronoi

DIRECTIONS_3D = tuple(d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0))
"""Half of the 26 neighbors of a voxel as (z, y, x) steps."""
DIRECTIONS_2D = tuple(d for d in DIRECTIONS_3D if d[0] == 0)
"""Half of the 8 neighbors of a pixel."""


def crossing_areas(voxel: tuple[float, float, float]) -> np.ndarray:
    """Surface [13] that one crossing of a line along each of `DIRECTIONS_3D` stands for.

    Args:
        voxel: size along z, y, x in any unit; the areas are in its square.
    """
    step_D3 = np.array(DIRECTIONS_3D) * np.array(voxel)
    length_D = np.linalg.norm(step_D3, axis=1)
    unit_D3 = step_D3 / length_D[:, None]
    voronoi = SphericalVoronoi(np.concatenate([unit_D3, -unit_D3]))
    share_D = voronoi.calculate_areas()[: len(unit_D3)] / (2 * np.pi)
    # Parallel lattice lines are one voxel volume per step length apart.
    return 2 * share_D * np.prod(voxel) / length_D


def crossing_lengths(pixel: tuple[float, float]) -> np.ndarray:
    """Perimeter [4] that one crossing of a line along each of `DIRECTIONS_2D` stands for.

    Args:
        pixel: size along y, x in any unit; the lengths are in this unit.
    """
    step_D2 = np.array(DIRECTIONS_2D)[:, 1:] * np.array(pixel)
    length_D = np.linalg.norm(step_D2, axis=1)
    angle_D = np.arctan2(step_D2[:, 0], step_D2[:, 1]) % np.pi
    order = np.argsort(angle_D)
    gap_D = np.diff(np.append(angle_D[order], angle_D[order[0]] + np.pi))
    share_D = np.empty(len(order))
    share_D[order] = (gap_D + np.roll(gap_D, 1)) / (2 * np.pi)
    return np.pi / 2 * share_D * np.prod(pixel) / length_D
