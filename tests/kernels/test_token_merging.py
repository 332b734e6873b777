"""Token merging against a loop over survivors; gradients in float64."""

import pytest
import torch
import torch.nn.functional as F

import affmae_kernels.precision as precision
from affmae_kernels.neighbourhoods import build_neighbourhoods
from affmae_kernels.token_merging import merge_tokens, select_survivors, token_scores


def inputs(batch, tokens, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, tokens, channels), (batch, tokens), (4, 5), (4,), (4,), (4,)]
    feat, score, *rest = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in (feat, score.sigmoid(), *rest)]


def slow(feat, score, survivors, near, weight, bias, norm_weight, norm_bias):
    """One survivor and neighbour at a time."""
    batch, tokens, channels = feat.shape
    out = torch.zeros(batch, survivors.shape[1], 4, channels, dtype=feat.dtype)
    for b in range(batch):
        for k, row in enumerate(survivors[b].tolist()):
            for cluster in near.nearest_BNC[b, row].tolist():
                for i in range(cluster * near.cluster_size, min((cluster + 1) * near.cluster_size, tokens)):
                    dx, dy = (near.pos_BN2[b, i] - near.pos_BN2[b, row]).tolist()
                    d = (dx * dx + dy * dy) ** 0.5
                    geometry = torch.tensor([dx, dy, d, dy / d if d else 0, dx / d if d else 0], dtype=feat.dtype)
                    g = F.gelu(F.layer_norm(weight @ geometry + bias, (4,), norm_weight, norm_bias, 1e-5))
                    out[b, k] += g[:, None] * score[b, i] * feat[b, i]
    return out.flatten(2)


@pytest.mark.parametrize(("tokens", "neighbours"), [(45, 16), (21, 64), (3, 64)])
def test_equals_a_loop(scatter, tokens, neighbours) -> None:
    _, near = build_neighbourhoods(scatter(2, tokens, (7, 8)), (7, 8), neighbours=neighbours)
    feat, score, *rest = inputs(2, tokens, 5, torch.float64)
    survivors = torch.stack([torch.randperm(tokens)[: max(1, tokens // 3)].sort().values for _ in range(2)])
    torch.testing.assert_close(
        merge_tokens(feat, score, survivors, near, *rest), slow(feat, score, survivors, near, *rest)
    )


def test_gradients_of_all_inputs(scatter) -> None:
    _, near = build_neighbourhoods(scatter(2, 18, (5, 6)), (5, 6), cluster_size=4, neighbours=8)
    args = inputs(2, 18, 3, torch.float64)
    survivors = torch.tensor([[0, 5, 17], [2, 3, 4]])
    assert torch.autograd.gradcheck(lambda f, s, *rest: merge_tokens(f, s, survivors, near, *rest), args)


def test_tiles_change_nothing_but_memory(scatter, monkeypatch) -> None:
    _, near = build_neighbourhoods(scatter(2, 50, (8, 8)), (8, 8), neighbours=16)
    args = inputs(2, 50, 4, torch.float64)
    survivors = torch.arange(20).expand(2, -1)
    whole = merge_tokens(args[0], args[1], survivors, near, *args[2:])
    expected = torch.autograd.grad(whole.square().sum(), args)
    monkeypatch.setattr(precision, "TILE_ELEMENTS", 2500)
    tiled = merge_tokens(args[0], args[1], survivors, near, *args[2:])
    torch.testing.assert_close(tiled, whole)
    for mine, other in zip(torch.autograd.grad(tiled.square().sum(), args), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_half_features_under_autocast(scatter) -> None:
    _, near = build_neighbourhoods(scatter(1, 40, (8, 8)), (8, 8), neighbours=16)
    feat, *rest = inputs(1, 40, 8)
    survivors = torch.arange(0, 40, 3)[None]
    half = feat.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = merge_tokens(half, rest[0], survivors, near, *rest[1:])
    assert out.dtype == torch.bfloat16
    exact = merge_tokens(half.double(), rest[0].double(), survivors, near, *(x.double() for x in rest[1:]))
    assert (out.double() - exact).norm() / exact.norm() < 4e-3


def test_wrong_shapes_are_named(scatter) -> None:
    _, near = build_neighbourhoods(scatter(1, 20, (8, 8)), (8, 8))
    feat, score, *rest = inputs(1, 20, 4)
    survivors = torch.arange(5)[None]
    with pytest.raises(ValueError, match=r"\[1, 19, 4\] and score_BN \[1, 20\].*\[1, 20\]"):
        merge_tokens(feat[:, :19], score, survivors, near, *rest)
    with pytest.raises(ValueError, match=r"survivors_BK must be int64 \[B = 1, K\]; got torch.int32"):
        merge_tokens(feat, score, survivors.int(), near, *rest)
    with pytest.raises(ValueError, match=r"weight_45 must be \[4, 5\]; got \[5, 4\]"):
        merge_tokens(feat, score, survivors, near, rest[0].T, *rest[1:])


def test_survivors_are_the_largest_with_ties_by_canvas_index() -> None:
    pos = torch.tensor([[[3, 3], [0, 0], [2, 1], [1, 2], [3, 0]]], dtype=torch.int32)
    order, near = build_neighbourhoods(pos, (4, 4), cluster_size=2, neighbours=2)
    value = torch.tensor([[5.0, 1.0, 1.0, 1.0, 1.0]]).gather(1, order)
    rows = select_survivors(value, near, 3)
    assert rows.equal(rows.sort().values)
    assert sorted(map(tuple, near.pos_BN2[0, rows[0]].tolist())) == [(0, 0), (3, 0), (3, 3)]


def test_nan_counts_as_infinite(scatter) -> None:
    _, near = build_neighbourhoods(scatter(1, 4, (3, 3)), (3, 3))
    value = torch.tensor([[1.0, float("nan"), 2.0, float("inf")]])
    assert select_survivors(value, near, 2).tolist() == [[1, 3]]


@pytest.mark.parametrize("count", [0, 21])
def test_count_of_survivors_out_of_range(scatter, count) -> None:
    _, near = build_neighbourhoods(scatter(1, 20, (8, 8)), (8, 8))
    with pytest.raises(ValueError, match=f"count must be from 1 to 20.*got {count}"):
        select_survivors(torch.zeros(1, 20), near, count)


def test_scores_are_computed_in_fp32_also_under_autocast() -> None:
    feat, weight, bias = torch.randn(2, 9, 6), torch.randn(1, 6), torch.randn(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = token_scores(feat.bfloat16(), weight, bias)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, (feat.bfloat16().float() @ weight[0] + bias).sigmoid())


def test_wrong_arguments_of_scores_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be \[1, 6\] and \[1\] of one dtype; got \[1, 5\]"):
        token_scores(torch.zeros(2, 9, 6), torch.zeros(1, 5), torch.zeros(1))
