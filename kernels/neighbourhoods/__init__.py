"""Neighbourhoods: balanced clusters of points on a canvas, and the nearest clusters of every point (method 3.1, 3.2).

Built once per stage and shared by all its blocks and by the merging. What is unusual: tokens live off any grid, the
order is exact (whole numbers and one float64 division, never a sum of rounded keys), every tie is broken by the canvas
index, and the tokens are physically reordered so that cluster c is the rows c*m ... c*m + m - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.neighbourhoods import reference

if TYPE_CHECKING:
    from affmae_kernels.neighbourhoods.visit_lists import VisitLists

__all__ = ["Neighbourhoods", "build_neighbourhoods"]

KERNEL_CLUSTER_SIZE = 8
"""The cluster size that kernels with visit lists take."""
KERNEL_CLUSTERS = 2**15
"""Such kernels take fewer clusters than this: an entry of a list is cluster << 16 | bits in int32."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Who is near whom, in one stage. The neighbours of a token are all members of its nearest clusters."""

    pos_BN2: Tensor
    """int32 (x, y) of the tokens, in cluster order; contiguous."""
    nearest_BNC: Tensor
    """int32 indices of each token's nearest clusters, nearest first, ties by the lower index; C = min(M/m, K)."""
    cluster_size: int
    """Rows per cluster (m); the last cluster may be short."""
    canvas_hw: tuple[int, int]
    """Height and width of the canvas, in cells."""

    @property
    def count(self) -> int:
        """Number of clusters, K = ceil(N / m)."""
        return -(-self.pos_BN2.shape[1] // self.cluster_size)

    @cached_property
    def visit_lists(self) -> VisitLists:
        """For the kernels: built at the first use, shared by all blocks of the stage."""
        from affmae_kernels.neighbourhoods.visit_lists import build_visit_lists  # needs Triton

        return build_visit_lists(self.nearest_BNC, self.count)

    def unsupported(self) -> str | None:
        """What kernels that use the visit lists cannot take of these neighbourhoods."""
        if self.cluster_size != KERNEL_CLUSTER_SIZE:
            return f"clusters of {self.cluster_size} tokens, only of {KERNEL_CLUSTER_SIZE}"
        if self.count >= KERNEL_CLUSTERS:
            return f"{self.count} clusters, only fewer than {KERNEL_CLUSTERS}"
        return None

    def members_BNM(self) -> tuple[Tensor, Tensor]:
        """Expands the nearest clusters to token rows.

        Returns:
            index_BNM: int64 row of each neighbour, in [0, K*m); rows >= N are the empty slots of the last cluster.
            valid_BNM: bool, False at those empty slots.
        """
        index_BNM = reference.cluster_members(self.nearest_BNC, self.cluster_size)
        return index_BNM, index_BNM < self.pos_BN2.shape[1]


def build_neighbourhoods(
    pos_BN2: Tensor,
    canvas_hw: tuple[int, int],
    *,
    cluster_size: int = 8,
    neighbours: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Neighbourhoods]:
    """Orders the tokens into balanced clusters and finds the nearest clusters of every token.

    The order is a serpentine walk over about ceil(N/m) equal anchor cells and, within a cell, the ratio
    |p - prev|^2 / (|p - next|^2 + 1e-5) of the squared distances to the previous and next cell's centre.

    Args:
        pos_BN2: int32 (x, y) cells, distinct within an image, 0 <= x < w, 0 <= y < h; any order; N >= 1.
        canvas_hw: height and width of the canvas, in cells.
        cluster_size: m, at least 1.
        neighbours: M, a multiple of m.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        order_BN: int64 permutation; row i of the ordered tokens is row order_BN[:, i] of the input.
        the `Neighbourhoods` of the ordered tokens. No gradients.

    Raises:
        ValueError: on wrong shapes, dtypes or sizes. Positions outside the canvas are not looked for (that would wait
            for the device).
    """
    height, width = canvas_hw
    if pos_BN2.ndim != 3 or pos_BN2.shape[2] != 2 or pos_BN2.shape[1] < 1 or pos_BN2.dtype != torch.int32:
        raise ValueError(f"pos_BN2 must be int32 [B, N >= 1, 2]; got {pos_BN2.dtype} {tuple(pos_BN2.shape)}")
    if pos_BN2.shape[1] > height * width:
        raise ValueError(f"{pos_BN2.shape[1]} tokens do not fit on a canvas of {height} x {width} cells")
    if cluster_size < 1 or neighbours < cluster_size or neighbours % cluster_size:
        raise ValueError(f"neighbours ({neighbours}) must be a positive multiple of cluster_size ({cluster_size})")
    if not reference.fits_int64(pos_BN2.shape[1], canvas_hw, cluster_size):
        raise ValueError(
            f"{pos_BN2.shape[1]} tokens in clusters of {cluster_size} on a canvas of {height} x {width} cells are too "
            "many for exact distances in int64; take a smaller image"
        )
    choice = choose_backend(backend, "neighbourhoods", pos_BN2.device)
    clusters = neighbours // cluster_size
    if choice.name == "triton":
        from affmae_kernels.neighbourhoods import triton

        order_BN, ordered_BN2, nearest_BNC = triton.build(pos_BN2, canvas_hw, cluster_size, clusters)
    else:
        order_BN, ordered_BN2, nearest_BNC = reference.build(pos_BN2, canvas_hw, cluster_size, clusters)
    return order_BN, Neighbourhoods(ordered_BN2, nearest_BNC, cluster_size, canvas_hw)
