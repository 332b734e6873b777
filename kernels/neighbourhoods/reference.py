"""Neighbourhoods in plain PyTorch (method 3.1 and 3.2): exact orders from whole numbers, batched, no synchronisation.

Memory: one int64 key per (token, cluster) pair, B * N * K * 8 bytes, in tiles of at most `TILE_ELEMENTS` keys.

Axes: B batch, N tokens, C nearest clusters, K clusters, m cluster size, M = C * m neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from affmae_kernels.precision import TILE_ELEMENTS


def fits_int64(tokens: int, canvas_hw: tuple[int, int], cluster_size: int) -> bool:
    """Whether the whole-number keys below stay in int64 (they do up to canvases of thousands of cells a side)."""
    height, width = canvas_hw
    clusters = -(-tokens // cluster_size)
    return (height**2 + width**2) * cluster_size**4 * clusters < 2**62 and max(canvas_hw) * (4 * clusters) < 2**30


@torch.no_grad()
def build(
    pos_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int, clusters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns order_BN (int64), the ordered pos_BN2 (int32) and nearest_BNC (int32)."""
    order_BN = cluster_order(pos_BN2.long(), canvas_hw, cluster_size)
    ordered_BN2 = torch.gather(pos_BN2, 1, order_BN[..., None].expand(-1, -1, 2))
    return order_BN, ordered_BN2, nearest_clusters(ordered_BN2.long(), canvas_hw, cluster_size, clusters)


def anchor_grid(count: int, canvas_hw: tuple[int, int], cluster_size: int) -> tuple[int, int]:
    """(rows, columns) of equal anchor cells for `count` tokens; about one cell per cluster."""
    height, width = canvas_hw
    edge = math.sqrt(height * width / -(-count // cluster_size))
    return max(1, round(height / edge)), max(1, round(width / edge))


def cluster_order(pos_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int) -> Tensor:
    """The permutation that sorts tokens by walk index, then ratio, then canvas index: three stable sorts."""
    height, width = canvas_hw
    rows, columns = anchor_grid(pos_BN2.shape[1], canvas_hw, cluster_size)
    order_BN = torch.argsort(pos_BN2[..., 1] * width + pos_BN2[..., 0], dim=1)
    if rows * columns < 3:
        return order_BN
    pos_BN2 = torch.gather(pos_BN2, 1, order_BN[..., None].expand(-1, -1, 2))
    column_BN = pos_BN2[..., 0] * columns // width
    row_BN = pos_BN2[..., 1] * rows // height
    walk_BN = row_BN * columns + torch.where(row_BN % 2 == 0, column_BN, columns - 1 - column_BN)
    ratio_BN = _ratio(pos_BN2, walk_BN, canvas_hw, rows, columns)
    by_ratio_BN = torch.argsort(ratio_BN, dim=1, stable=True)
    by_walk_BN = torch.argsort(torch.gather(walk_BN, 1, by_ratio_BN), dim=1, stable=True)
    return torch.gather(order_BN, 1, torch.gather(by_ratio_BN, 1, by_walk_BN))


def _ratio(pos_BN2: Tensor, walk_BN: Tensor, canvas_hw: tuple[int, int], rows: int, columns: int) -> Tensor:
    """|p - prev|^2 / (|p - next|^2 + 1e-5): whole numbers (unit 1 / (2 rows columns)), one float64 division."""
    height, width = canvas_hw
    unit = 2 * rows * columns
    walk_L = torch.arange(rows * columns, device=pos_BN2.device)
    row_L, column_L = walk_L // columns, walk_L % columns
    column_L = torch.where(row_L % 2 == 0, column_L, columns - 1 - column_L)
    x_L = (2 * column_L + 1) * width * rows - rows * columns
    y_L = (2 * row_L + 1) * height * columns - rows * columns
    centre_L2 = torch.stack([x_L, y_L], -1)
    before_12, after_12 = 2 * centre_L2[:1] - centre_L2[1:2], 2 * centre_L2[-1:] - centre_L2[-2:-1]
    centre_L2 = torch.cat([before_12, centre_L2, after_12])
    token_BN2 = pos_BN2 * unit
    previous_BN = (token_BN2 - centre_L2[walk_BN]).square().sum(-1)
    next_BN = (token_BN2 - centre_L2[walk_BN + 2]).square().sum(-1)
    return previous_BN.double() / (next_BN.double() + 1e-5 * unit**2)


def nearest_clusters(pos_BN2: Tensor, canvas_hw: tuple[int, int], cluster_size: int, clusters: int) -> Tensor:
    """Indices (int32) of the `clusters` nearest clusters of every token, nearest first, ties by the lower index.

    The squared distance to the mean of a cluster is |size * p - sum|^2 / size^2. Multiplied by (m * size of the last
    cluster)^2 it is a whole number for every cluster, and times K plus the cluster index a key without ties: the
    order is that of the exact distances, which float64 reproduces at these magnitudes.
    """
    batch, tokens, _ = pos_BN2.shape
    count = -(-tokens // cluster_size)
    last = tokens - (count - 1) * cluster_size
    padding = torch.zeros(batch, count * cluster_size - tokens, 2, dtype=torch.int64, device=pos_BN2.device)
    sum_BK2 = torch.cat([pos_BN2, padding], 1).view(batch, count, cluster_size, 2).sum(2)
    cluster_K = torch.arange(count, device=pos_BN2.device)
    size_K = torch.where(cluster_K == count - 1, last, cluster_size)
    scale_K = torch.where(cluster_K == count - 1, cluster_size, last)

    def search(pos_Bn2: Tensor) -> Tensor:
        scaled_BnK = torch.zeros(*pos_Bn2.shape[:2], count, dtype=torch.int64, device=pos_Bn2.device)
        for axis in range(2):
            scaled_BnK += (pos_Bn2[..., axis, None] * size_K - sum_BK2[:, None, :, axis]).mul_(scale_K).square_()
        key_BnK = scaled_BnK.mul_(count).add_(cluster_K)
        return key_BnK.topk(min(clusters, count), dim=-1, largest=False, sorted=True).indices.int()

    step = max(1, TILE_ELEMENTS // 4 // max(1, batch * count))
    return torch.cat([search(pos_BN2[:, start : start + step]) for start in range(0, tokens, step)], 1)


def cluster_members(nearest_BNC: Tensor, cluster_size: int) -> Tensor:
    """Row indices (int64) of the members of the listed clusters, [B, N, C * m]."""
    slot_m = torch.arange(cluster_size, device=nearest_BNC.device)
    return (nearest_BNC.long()[..., None] * cluster_size + slot_m).flatten(2)


def relative_geometry(offset_2: Tensor) -> Tensor:
    """(dx, dy, d, dy/d, dx/d) of integer offsets (..., 2) on the canvas; both ratios are 0 at d = 0. [..., 5].

    Args:
        offset_2: floating offsets neighbour - token, in cells; its dtype is the result's.
    """
    distance_1 = offset_2.square().sum(-1, keepdim=True).sqrt()
    # d is 0 or at least 1, so the clamp only keeps 0/0 from becoming NaN.
    ratio_2 = offset_2 / distance_1.clamp(min=0.5)
    return torch.cat([offset_2, distance_1, ratio_2.flip(-1)], -1)


def neighbour_geometry(pos_BP2: Tensor, own_Bn2: Tensor, index_BnM: Tensor, dtype: torch.dtype) -> Tensor:
    """(dx, dy, d, dy/d, dx/d) from each token to its neighbours, [B, n, M, 5]."""
    batch, rows, count = index_BnM.shape
    flat_B1 = index_BnM.reshape(batch, rows * count, 1).expand(-1, -1, 2)
    neighbour_BnM2 = torch.gather(pos_BP2, 1, flat_B1).view(batch, rows, count, 2)
    return relative_geometry((neighbour_BnM2 - own_Bn2[:, :, None]).to(dtype))
