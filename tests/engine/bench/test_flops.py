"""Operations from shapes: what a counter sees on the reference path, and by hand what it does not see."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from affmae_engine.bench.case import Case
from affmae_engine.bench.flops import forward_flops, parts, seen_flops
from affmae_engine.bench.step import make_network, random_batches
from affmae_engine.config import TrainConfig
from affmae_engine.train.device import pick_device

CPU = pick_device(TrainConfig(device="cpu"))


def counted(case: Case) -> float:
    """FlopCounterMode's total of a forward pass, for one image."""
    model = make_network(case, CPU, recorded=False).model
    batch = random_batches(case, CPU.device)[0]
    inputs = [batch[name] for name in ("image", "visible", "masked") if name in batch]
    # The counter knows attention as two products, not as the fused operation of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return counter.get_total_flops() / case.batch


@pytest.mark.parametrize("model", ["affmae", "vit-mae"])
@pytest.mark.parametrize("work", ["pretrain", "finetune", "predict"])
def test_the_counter_sees_what_is_predicted(model: str, work: str) -> None:
    case = Case(model=model, work=work, size="tiny", resolution=128, batch=2)
    assert counted(case) == seen_flops(case)


def test_small_at_full_depth() -> None:
    for model in ("affmae", "vit-mae"):
        case = Case(model=model, size="small", resolution=192, batch=1)
        assert counted(case) == seen_flops(case)


def test_sparse_parts_by_hand() -> None:
    """tiny at 128 px: 128 of 256 cells are visible; widths 32, 64, 96, 96; 40 % survive; decoder 128 wide."""
    found = forward_flops(Case(model="affmae", size="tiny", resolution=128, batch=2))
    tokens, dims, heads, depths = (128, 51, 20, 8), (32, 64, 96, 96), (1, 2, 3, 3), (1, 1, 2, 1)
    attention = sum(
        depth * n * (4 * (min(n, 64) + 1) * dim + 2 * min(n, 64) * 5 * a)
        for n, dim, a, depth in zip(tokens, dims, heads, depths, strict=True)
    )
    assert found["encoder, attention"] == attention
    merging = sum(
        k * min(n, 64) * (4 * 2 * dim + 4 * 2 * 5) for n, k, dim in zip(tokens, tokens[1:], dims, strict=False)
    )
    assert found["merging, gathering"] == merging
    assert found["decoder, sampling"] == 4 * 2 * 128 * (4 * 4) * 2 * 128  # steps, attentions, queries, rows, width


def test_the_sparse_count_is_what_grows_slowly() -> None:
    """Twice the edge: four times the tokens, so four times AFFMAE's attention, sixteen times a ViT's."""
    for model, growth in (("affmae", 4), ("vit-mae", 16)):
        small, large = (
            forward_flops(Case(model=model, size="base", resolution=edge, batch=1))["encoder, attention"]
            for edge in (512, 1024)
        )
        assert large / small == pytest.approx(growth, rel=2e-3)


def test_the_share_at_512_pixels() -> None:
    """AFFMAE needs a seventh to a tenth of ViT-MAE's operations."""
    totals = [
        sum(part.flops for part in parts(Case(model=model, size="base", resolution=512, batch=1)))
        for model in ("vit-mae", "affmae")
    ]
    assert 7 < totals[0] / totals[1] < 10
