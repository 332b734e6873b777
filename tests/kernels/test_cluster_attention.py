"""Cluster attention against PyTorch's own attention and a loop over tokens; gradients in float64."""

import pytest
import torch
import torch.nn.functional as F

import affmae_kernels.precision as precision
from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.neighbourhoods import build_neighbourhoods


def inputs(batch, tokens, heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, 3, heads, width), (heads, width), (heads, width), (heads, 5), (heads,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors]


def slow(qkv, near, blank_key, blank_value, weight, bias):
    """One token and head at a time, in float64."""
    qkv, blank_key, blank_value, weight, bias = (
        x.detach().double() for x in (qkv, blank_key, blank_value, weight, bias)
    )
    batch, tokens, _, heads, width = qkv.shape
    out = torch.zeros(batch, tokens, heads, width, dtype=torch.float64)
    for b in range(batch):
        for n in range(tokens):
            members = [
                c * near.cluster_size + s for c in near.nearest_BNC[b, n].tolist() for s in range(near.cluster_size)
            ]
            members = [i for i in members if i < tokens]
            for h in range(heads):
                logits = []
                for i in members:
                    dx, dy = (near.pos_BN2[b, i] - near.pos_BN2[b, n]).double().tolist()
                    d = (dx * dx + dy * dy) ** 0.5
                    geometry = torch.tensor([dx, dy, d, dy / d if d else 0, dx / d if d else 0], dtype=torch.float64)
                    logits.append(qkv[b, n, 0, h] @ qkv[b, i, 1, h] * width**-0.5 + weight[h] @ geometry + bias[h])
                logits.append(qkv[b, n, 0, h] @ blank_key[h] * width**-0.5)
                share = torch.stack(logits).softmax(0)
                values = torch.cat([qkv[b, members, 2, h], blank_value[h][None]])
                out[b, n, h] = share @ values
    return out


@pytest.mark.parametrize(
    ("canvas", "tokens", "neighbours"), [((7, 9), 45, 16), ((5, 5), 25, 64), ((4, 4), 3, 64), ((3, 3), 1, 64)]
)
def test_equals_a_loop_over_tokens(scatter, canvas, tokens, neighbours) -> None:
    _, near = build_neighbourhoods(scatter(2, tokens, canvas), canvas, neighbours=neighbours)
    args = inputs(2, tokens, 2, 4)
    out = cluster_attention(args[0], near, *args[1:])
    torch.testing.assert_close(out.double(), slow(args[0], near, *args[1:]), atol=1e-5, rtol=1e-5)


def test_full_neighbourhood_equals_scaled_dot_product_attention(scatter) -> None:
    batch, tokens, heads, width = 2, 61, 3, 8
    _, near = build_neighbourhoods(scatter(batch, tokens, (9, 10)), (9, 10))
    args = inputs(batch, tokens, heads, width, torch.float64)
    qkv, blank_key, blank_value, weight, bias = args
    ours = cluster_attention(qkv, near, *args[1:])

    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    key = torch.cat([key, blank_key[None, :, None].expand(batch, -1, -1, -1)], 2)
    value = torch.cat([value, blank_value[None, :, None].expand(batch, -1, -1, -1)], 2)
    delta = (near.pos_BN2[:, None] - near.pos_BN2[:, :, None]).double()
    d = delta.norm(dim=-1, keepdim=True)
    geometry = torch.cat([delta, d, torch.nan_to_num(delta.flip(-1) / d)], -1)
    additive = torch.einsum("bnmf,hf->bhnm", geometry, weight) + bias[:, None, None]
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(additive, (0, 1))).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)

    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, args, upstream), torch.autograd.grad(theirs, args, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("tokens", [19, 5])
def test_gradients_of_all_inputs(scatter, tokens) -> None:
    _, near = build_neighbourhoods(scatter(2, tokens, (5, 6)), (5, 6), cluster_size=4, neighbours=8)
    args = inputs(2, tokens, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda q, *rest: cluster_attention(q, near, *rest), args)


def test_tiles_change_nothing_but_memory(scatter, monkeypatch) -> None:
    _, near = build_neighbourhoods(scatter(2, 50, (8, 8)), (8, 8), neighbours=16)
    args = inputs(2, 50, 2, 4, torch.float64)
    whole = cluster_attention(args[0], near, *args[1:])
    upstream = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, args, upstream)
    monkeypatch.setattr(precision, "TILE_ELEMENTS", 2000)
    tiled = cluster_attention(args[0], near, *args[1:])
    torch.testing.assert_close(tiled, whole)
    for mine, other in zip(torch.autograd.grad(tiled, args, upstream), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_features_are_computed_in_fp32_also_under_autocast(scatter, dtype, tolerance) -> None:
    _, near = build_neighbourhoods(scatter(1, 40, (8, 8)), (8, 8), neighbours=16)
    args = inputs(1, 40, 2, 8)
    half = args[0].detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cluster_attention(half, near, *args[1:])
    assert out.dtype == dtype
    exact = cluster_attention(half.double(), near, *(x.double() for x in args[1:]))
    error = (out.double() - exact).norm() / exact.norm()
    assert error < tolerance / 2  # one rounding of the result, none on the way


def test_wrong_shapes_are_named(scatter) -> None:
    _, near = build_neighbourhoods(scatter(1, 20, (8, 8)), (8, 8))
    qkv, *rest = inputs(1, 20, 2, 4)
    with pytest.raises(ValueError, match=r"qkv_BN3HD must be floating.*\(1, 20, 2, 2, 4\)"):
        cluster_attention(qkv[:, :, :2], near, *rest)
    with pytest.raises(ValueError, match=r"\(1, 19, 3, 2, 4\) does not belong to.*\[1, 20\]"):
        cluster_attention(qkv[:, :19], near, *rest)
    with pytest.raises(ValueError, match=r"bias_weight_H5 must be \[2, 5\].*got \[1, 5\]"):
        cluster_attention(qkv, near, rest[0], rest[1], rest[2][:1], rest[3])
