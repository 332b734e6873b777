"""The neighbourhoods' kernels against the reference: equal in every element, on odd canvases and numbers of tokens."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.neighbourhoods import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "one token": ((3, 3), 1, 8, 64),
    "one cluster": ((4, 4), 5, 8, 64),
    "two anchor cells": ((2, 8), 16, 8, 16),
    "fewer clusters than neighbours": ((6, 7), 37, 8, 64),
    "full canvas": ((9, 9), 81, 8, 24),
    "flat canvas, short tail": ((3, 41), 90, 8, 64),
    "tall canvas": ((47, 5), 133, 8, 32),
    "clusters of 4": ((12, 10), 71, 4, 16),
    "clusters of 5": ((12, 10), 63, 5, 15),
    "sparse": ((60, 60), 50, 8, 64),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_to_the_reference(scatter, case) -> None:
    canvas, tokens, cluster_size, neighbours = case
    pos = scatter(2, tokens, canvas, seed=tokens)
    options = {"cluster_size": cluster_size, "neighbours": neighbours}
    order, near = build(pos, canvas, **options, backend="reference")
    for _ in range(2):  # slots are handed out in another order in every run
        order_again, again = build(pos.to(DEVICE), canvas, **options, backend="triton")
        assert torch.equal(order_again.cpu(), order) and order_again.dtype == order.dtype
        assert torch.equal(again.pos_BN2.cpu(), near.pos_BN2)
        assert torch.equal(again.nearest_BNC.cpu(), near.nearest_BNC) and again.nearest_BNC.dtype == torch.int32


def test_clustered_tokens_and_strided_positions(scatter) -> None:
    """All tokens in one corner: anchor cells are full or empty."""
    pos = torch.cat([scatter(1, 60, (8, 8)), torch.zeros(1, 60, 2, dtype=torch.int32)], 2)[..., :2]
    order, near = build(pos, (40, 24), backend="reference")
    order_again, again = build(pos.to(DEVICE), (40, 24), backend="triton")
    assert torch.equal(order_again.cpu(), order) and torch.equal(again.nearest_BNC.cpu(), near.nearest_BNC)


@pytest.mark.gpu
@pytest.mark.parametrize(("canvas", "tokens"), [((64, 64), 2048), ((128, 128), 8192), ((128, 128), 16384)])
def test_equal_to_the_reference_at_full_size(scatter, canvas, tokens) -> None:
    pos = scatter(2, tokens, canvas).cuda()
    order, near = build(pos, canvas, backend="reference")
    order_again, again = build(pos, canvas, backend="triton")
    assert torch.equal(order_again, order) and torch.equal(again.nearest_BNC, near.nearest_BNC)
