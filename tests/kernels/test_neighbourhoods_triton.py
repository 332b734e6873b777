"""The neighbourhoods' kernels against the reference, beyond the cases of `affmae_kernels.neighbourhoods.cases`."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.neighbourhoods import build_neighbourhoods

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_clustered_tokens_and_strided_positions(scatter) -> None:
    """All tokens in one corner: anchor cells are full or empty."""
    pos = torch.cat([scatter(1, 60, (8, 8)), torch.zeros(1, 60, 2, dtype=torch.int32)], 2)[..., :2]
    order, near = build_neighbourhoods(pos, (40, 24), backend="reference")
    order_again, again = build_neighbourhoods(pos.to(DEVICE), (40, 24), backend="triton")
    assert torch.equal(order_again.cpu(), order) and torch.equal(again.nearest_BNC.cpu(), near.nearest_BNC)


def test_slots_handed_out_in_another_order_change_nothing(scatter) -> None:
    pos = scatter(2, 133, (12, 14)).to(DEVICE)
    order, near = build_neighbourhoods(pos, (12, 14), backend="triton")
    reverse, again = build_neighbourhoods(pos.flip(1), (12, 14), backend="triton")
    assert torch.equal(132 - reverse, order)
    assert torch.equal(again.pos_BN2, near.pos_BN2) and torch.equal(again.nearest_BNC, near.nearest_BNC)


@pytest.mark.gpu
@pytest.mark.parametrize(("canvas", "tokens"), [((64, 64), 2048), ((128, 128), 8192), ((128, 128), 16384)])
def test_equal_to_the_reference_at_full_size(scatter, canvas, tokens) -> None:
    pos = scatter(2, tokens, canvas).cuda()
    order, near = build_neighbourhoods(pos, canvas, backend="reference")
    order_again, again = build_neighbourhoods(pos, canvas, backend="triton")
    assert torch.equal(order_again, order) and torch.equal(again.nearest_BNC, near.nearest_BNC)
