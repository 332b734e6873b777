"""Visit lists against sets of pairs built one by one."""

import pytest
import torch

from affmae_kernels.neighbourhoods import build_neighbourhoods

visit_lists = pytest.importorskip("affmae_kernels.neighbourhoods.visit_lists", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs_of(side, own_size: int) -> list[set[tuple[int, int, int]]]:
    """Per image: (group, entry's cluster, bit) of every membership in the lists; checks the order on the way."""
    found = []
    for entries, counts in zip(side.entry_BGE.cpu(), side.count_BG.cpu(), strict=True):
        assert len(counts) == -(-own_size // 2)
        image = set()
        for group, count in enumerate(counts.tolist()):
            listed = entries[group, :count].tolist()
            assert [e >> 16 for e in listed] == sorted({e >> 16 for e in listed})
            image |= {(group, e >> 16, bit) for e in listed for bit in range(16) if e >> bit & 1}
        found.append(image)
    return found


@pytest.mark.parametrize(
    ("canvas", "tokens", "neighbours"), [((9, 13), 70, 32), ((5, 5), 25, 64), ((4, 4), 3, 64), ((12, 12), 129, 24)]
)
def test_both_sides_list_every_pair_once(scatter, canvas, tokens, neighbours) -> None:
    _, near = build_neighbourhoods(scatter(2, tokens, canvas), canvas, neighbours=neighbours, backend="reference")
    made = visit_lists.build_visit_lists(near.nearest_BNC.to(DEVICE), near.count)
    expected_rows, expected_keys = [], []
    for nearest in near.nearest_BNC.tolist():
        pairs = [(row, cluster) for row, clusters in enumerate(nearest) for cluster in clusters]
        expected_rows.append({(row // 16, cluster, row % 16) for row, cluster in pairs})
        expected_keys.append({(cluster // 2, row // 8, 8 * (cluster % 2) + row % 8) for row, cluster in pairs})
    assert pairs_of(made.rows, -(-tokens // 8)) == expected_rows
    assert pairs_of(made.keys, near.count) == expected_keys
