"""Visit lists: which clusters a group of rows has to visit, and, transposed, who visits a group of clusters.

Rows of one group share most of their nearest clusters, so a kernel visits the union of them in dense tiles and removes
the pairs that are no neighbours by one membership bit per (row, cluster). The union costs pairs that do not count
(about 1.9 for a real one at 16 rows) and buys tensor-core tiles. With the transposed lists a program owns its keys, so
that gradients are summed without atomics and always in the same order.

Axes: B batch, Q rows, C nearest clusters, K clusters, G groups of `GROUP` rows, E entries. A row cluster is 8
consecutive rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.neighbourhoods.pairs import image_and_part

GROUP = 16
"""Rows (or keys) of one group: two clusters of 8, one side of a tensor-core tile. 8 and 32 measured slower."""
CLUSTER = 8
"""The only cluster size that the kernels take: a membership entry holds one byte per row cluster."""


@dataclass(frozen=True)
class VisitList:
    """The lists of one side."""

    entry_BGE: Tensor
    """int32 cluster << 16 | bits, ascending by cluster; only the first `count` of each group are written."""
    count_BG: Tensor
    """int32 entries of each group."""


@dataclass(frozen=True)
class VisitLists:
    """Both sides of one relation between rows and clusters."""

    rows: VisitList
    """Per group of 16 rows the clusters to visit; bit t of an entry: row 16 g + t has that cluster as a neighbour."""
    keys: VisitList
    """Per group of 2 clusters the row clusters that visit it; bit 8 c + t: row t of that row cluster has cluster
    2 g + c as a neighbour."""


@triton.jit(do_not_specialize=["ROWS", "ROW_CLUSTERS", "K"])
def _adjacency_kernel(
    NEAREST, ADJACENT, ROWS, ROW_CLUSTERS, K, C: tl.constexpr, CP: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """One program: one row cluster's bytes; bit t of [b, r, c] says that row 8 r + t has cluster c as a neighbour."""
    b, r = image_and_part(ROW_CLUSTERS)
    e = tl.arange(0, 8 * CP)
    row = r * 8 + e // CP
    choice = e % CP
    # [8 * CP]
    cluster = tl.load(NEAREST + (b * ROWS + row) * C + choice, mask=(row < ROWS) & (choice < C), other=-1)
    bit = tl.full([8 * CP], 1, tl.int32) << (e // CP)
    out = ADJACENT + (b * ROW_CLUSTERS + r) * K
    for k0 in range(0, K, KB):
        column = k0 + tl.arange(0, KB)
        byte = tl.sum(tl.where(cluster[:, None] == column[None, :], bit[:, None], 0), 0)
        tl.store(out + column, byte.to(tl.uint8), mask=column < K)


@triton.jit(do_not_specialize=["OWN", "OTHER", "GROUPS", "own_stride", "other_stride"])
def _compact_kernel(ADJACENT, ENTRY, COUNT, OWN, OTHER, GROUPS, own_stride, other_stride, EB: tl.constexpr):
    """One program: the non-zero bytes of one group's two own rows of the adjacency, compacted into its list."""
    b, g = image_and_part(GROUPS)
    base = ADJACENT + b * OWN * OTHER
    out = ENTRY + (b * GROUPS + g) * OTHER
    filled = 0
    for e0 in range(0, OTHER, EB):
        other = e0 + tl.arange(0, EB)
        inside = other < OTHER
        # [EB]
        low = tl.load(base + 2 * g * own_stride + other * other_stride, mask=inside, other=0).to(tl.int32)
        both = inside & (2 * g + 1 < OWN)
        # [EB]
        high = tl.load(base + (2 * g + 1) * own_stride + other * other_stride, mask=both, other=0).to(tl.int32)
        bits = low | (high << 8)
        hit = (bits != 0).to(tl.int32)
        slot = filled + tl.cumsum(hit, 0) - hit
        tl.store(out + slot, (other << 16) | bits, mask=hit != 0)
        filled += tl.sum(hit, 0)
    tl.store(COUNT + b * GROUPS + g, filled)


def build_visit_lists(nearest_BQC: Tensor, clusters: int) -> VisitLists:
    """The visit lists of rows whose nearest clusters are given.

    Args:
        nearest_BQC: int32 indices of clusters, distinct in a row.
        clusters: K, less than 2^15, as is the number of row clusters.
    """
    nearest_BQC = nearest_BQC.contiguous()
    batch, rows, width = nearest_BQC.shape
    row_clusters = triton.cdiv(rows, CLUSTER)
    # Which row clusters are near which clusters, as bytes of membership bits
    adjacent_BRK = torch.empty(batch, row_clusters, clusters, dtype=torch.uint8, device=nearest_BQC.device)
    _adjacency_kernel[(batch * row_clusters,)](
        NEAREST=nearest_BQC, ADJACENT=adjacent_BRK, ROWS=rows, ROW_CLUSTERS=row_clusters, K=clusters,
        C=width, CP=triton.next_power_of_2(width), KB=min(128, triton.next_power_of_2(clusters)), num_warps=4,
    )  # fmt: skip
    return VisitLists(_compact(adjacent_BRK, transposed=False), _compact(adjacent_BRK, transposed=True))


def _compact(adjacent_BRK: Tensor, *, transposed: bool) -> VisitList:
    """The lists of groups of two rows of the adjacency, or of two columns."""
    batch, row_clusters, clusters = adjacent_BRK.shape
    own, other = (clusters, row_clusters) if transposed else (row_clusters, clusters)
    groups = triton.cdiv(own, 2)
    entry_BGE = torch.empty(batch, groups, other, dtype=torch.int32, device=adjacent_BRK.device)
    count_BG = torch.empty(batch, groups, dtype=torch.int32, device=adjacent_BRK.device)
    _compact_kernel[(batch * groups,)](
        ADJACENT=adjacent_BRK, ENTRY=entry_BGE, COUNT=count_BG, OWN=own, OTHER=other, GROUPS=groups,
        own_stride=1 if transposed else clusters, other_stride=clusters if transposed else 1,
        EB=min(1024, triton.next_power_of_2(other)), num_warps=4,
    )  # fmt: skip
    return VisitList(entry_BGE, count_BG)
