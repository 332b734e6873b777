"""Walk lists: which clusters a group of rows has to visit, and, transposed, by whom a group of clusters is visited.

Rows of one group share most of their nearest clusters, so a kernel walks the union of them in dense tiles and removes
the pairs that are no neighbours by one membership bit per (row, cluster). What is unusual: the union costs wasted pairs
(about 1.9 of them for a real one at 16 rows) and buys tensor-core tiles; the transposed list lets a program own its
keys, so that gradients are summed without atomics, always in the same order.

Axes: B batch, Q rows, C nearest clusters, K clusters, G groups of `GROUP` rows. A row cluster is 8 consecutive rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16
"""Rows (or keys) of one group: two clusters of 8, one side of a tensor-core tile. 8 and 32 measured slower."""
CLUSTER = 8
"""The only cluster size that the kernels take: a membership entry holds one byte per row cluster."""
MAX_CLUSTERS = 2**15
"""An entry is cluster << 16 | bits in int32."""


@dataclass(frozen=True)
class Walk:
    """One side's lists."""

    entry_BGE: Tensor
    """int32: cluster << 16 | bits, ascending by cluster; only the first `count` of each group are written."""
    count_BG: Tensor
    """int32: entries of each group."""


@dataclass(frozen=True)
class Walks:
    """Both sides of one relation between rows and clusters."""

    rows: Walk
    """Per group of 16 rows the clusters to visit; bit t of an entry: row 16 g + t has that cluster as a neighbour."""
    keys: Walk
    """Per group of 2 clusters the row clusters that visit it; bit 8 c + t: row t of that row cluster has cluster
    2 g + c as a neighbour."""


@triton.jit(do_not_specialize=["ROWS", "K"])
def _adjacency_kernel(NEAREST, ADJACENT, ROWS, K, C: tl.constexpr, CP: tl.constexpr, KB: tl.constexpr):
    """One program: one row cluster's bytes; bit t of [b, r, c] says that row 8 r + t has cluster c as a neighbour."""
    r = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, 8 * CP)
    row = r * 8 + e // CP
    choice = e % CP
    cluster = tl.load(NEAREST + (b * ROWS + row) * C + choice, mask=(row < ROWS) & (choice < C), other=-1)
    bit = tl.full([8 * CP], 1, tl.int32) << (e // CP)
    out = ADJACENT + (b * tl.num_programs(0) + r) * K
    for k0 in range(0, K, KB):
        column = k0 + tl.arange(0, KB)
        byte = tl.sum(tl.where(cluster[:, None] == column[None, :], bit[:, None], 0), 0)
        tl.store(out + column, byte.to(tl.uint8), mask=column < K)


@triton.jit(do_not_specialize=["OWN", "OTHER", "own_stride", "other_stride"])
def _compact_kernel(ADJACENT, ENTRY, COUNT, OWN, OTHER, own_stride, other_stride, EB: tl.constexpr):
    """One program: the non-zero bytes of one group's two own rows of the adjacency, compacted into its list."""
    g = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    base = ADJACENT + b * OWN * OTHER
    out = ENTRY + (b * tl.num_programs(0) + g) * OTHER
    filled = 0
    for e0 in range(0, OTHER, EB):
        other = e0 + tl.arange(0, EB)
        inside = other < OTHER
        low = tl.load(base + 2 * g * own_stride + other * other_stride, mask=inside, other=0).to(tl.int32)
        both = inside & (2 * g + 1 < OWN)
        high = tl.load(base + (2 * g + 1) * own_stride + other * other_stride, mask=both, other=0).to(tl.int32)
        bits = low | (high << 8)
        hit = (bits != 0).to(tl.int32)
        slot = filled + tl.cumsum(hit, 0) - hit
        tl.store(out + slot, (other << 16) | bits, mask=hit != 0)
        filled += tl.sum(hit, 0)
    tl.store(COUNT + b * tl.num_programs(0) + g, filled)


def build_walks(nearest_BQC: Tensor, clusters: int) -> Walks:
    """The walk lists of rows whose nearest clusters are given.

    Args:
        nearest_BQC: int32 indices of clusters, distinct in a row.
        clusters: K, at most `MAX_CLUSTERS`, as is the number of row clusters.
    """
    row_entry_BGE, row_count_BG, key_entry_BGE, key_count_BG = _build(nearest_BQC, clusters)
    return Walks(Walk(row_entry_BGE, row_count_BG), Walk(key_entry_BGE, key_count_BG))


@torch.library.custom_op("affmae::build_walks", mutates_args=())
def _build(nearest_BQC: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries and counts of the rows' side, then of the keys' side."""
    nearest_BQC = nearest_BQC.contiguous()
    batch, rows, width = nearest_BQC.shape
    row_clusters = triton.cdiv(rows, CLUSTER)
    adjacent_BRK = torch.empty(batch, row_clusters, clusters, dtype=torch.uint8, device=nearest_BQC.device)
    block = min(128, triton.next_power_of_2(clusters))
    padded = triton.next_power_of_2(width)
    _adjacency_kernel[(row_clusters, batch)](
        nearest_BQC, adjacent_BRK, rows, clusters, C=width, CP=padded, KB=block, num_warps=4
    )
    lists = _empty_lists(nearest_BQC, clusters)
    sides = ((lists[:2], row_clusters, clusters, clusters, 1), (lists[2:], clusters, row_clusters, 1, clusters))
    for (entry_BGE, count_BG), own, other, own_stride, other_stride in sides:
        block = min(1024, triton.next_power_of_2(other))
        _compact_kernel[(count_BG.shape[1], batch)](
            adjacent_BRK, entry_BGE, count_BG, own, other, own_stride, other_stride, EB=block, num_warps=4
        )
    return lists


@_build.register_fake
def _empty_lists(nearest_BQC: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, _ = nearest_BQC.shape
    row_clusters = -(-rows // CLUSTER)
    row_groups, key_groups = -(-row_clusters // 2), -(-clusters // 2)
    return (
        nearest_BQC.new_empty(batch, row_groups, clusters),
        nearest_BQC.new_empty(batch, row_groups),
        nearest_BQC.new_empty(batch, key_groups, row_clusters),
        nearest_BQC.new_empty(batch, key_groups),
    )
