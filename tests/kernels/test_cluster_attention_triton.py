"""Cluster attention's kernels beyond the cases of `affmae_kernels.cluster_attention.cases`: extreme numbers, same bits,
what the launchers return besides."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.cluster_attention import triton as kernels
from affmae_kernels.neighbourhoods import build_neighbourhoods

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [pytest.param(dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)]
DTYPES = [torch.float32, *HALF]
# canvas, tokens, neighbours, batch, heads, head width
SHAPES = {
    "one token": ((3, 3), 1, 64, 1, 1, 16),
    "short tail, flat canvas": ((5, 23), 83, 16, 1, 3, 32),
    "several images": ((5, 5), 19, 16, 5, 2, 16),
    "several groups": ((16, 9), 129, 64, 1, 4, 32),
}


def inputs(shape, dtype, seed=0, scale=1.0):
    torch.manual_seed(seed)  # of the gradients that are drawn afterwards
    _, tokens, _, batch, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, tokens, 3, heads, width), (heads, width), (heads, width), (heads, 5), (heads,)]
    tensors = [torch.randn(s, generator=generator) * scale for s in sizes]
    tensors[0] = tensors[0].to(dtype)
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def neighbourhoods(scatter, shape, seed=0):
    canvas, tokens, neighbours, batch, _, _ = shape
    return build_neighbourhoods(
        scatter(batch, tokens, canvas, seed).to(DEVICE), canvas, neighbours=neighbours, backend="reference"
    )[1]


def error(found, exact) -> float:
    assert torch.isfinite(found).all()
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


def both(args, near, upstream):
    """(out, gradients) of the kernel and of the float64 reference, for the same rounded inputs."""
    out = cluster_attention(args[0], near, *args[1:], backend="triton")
    gradients = torch.autograd.grad(out, args, upstream)
    exact_args = [a.detach().double().requires_grad_() for a in args]
    exact = cluster_attention(exact_args[0], near, *exact_args[1:], backend="reference")
    return (out, *gradients), (exact, *torch.autograd.grad(exact, exact_args, upstream.double()))


def test_strided_features_and_gradients(scatter) -> None:
    shape = SHAPES["short tail, flat canvas"]
    args, near = inputs(shape, torch.float32), neighbourhoods(scatter, shape)
    wide = torch.randn(*args[0].shape[:4], 2 * args[0].shape[4]).to(DEVICE)
    args[0] = wide[..., ::2].requires_grad_()
    upstream = torch.randn(args[0].shape[1], args[0].shape[0], *args[0].shape[3:]).to(DEVICE).transpose(0, 1)
    found, exact = both(args, near, upstream)
    assert max(error(mine, other) for mine, other in zip(found, exact, strict=True)) < 1e-5


@pytest.mark.gpu  # the interpreter knows one order only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_in_every_run(scatter, dtype) -> None:
    runs = []
    for _ in range(2):
        args, near = inputs(SHAPES["several groups"], dtype), neighbourhoods(scatter, SHAPES["several groups"])
        out = cluster_attention(args[0], near, *args[1:], backend="triton")
        runs.append((out, *torch.autograd.grad(out, args, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_images_than_a_grid_holds(scatter, monkeypatch) -> None:
    args, near = inputs(SHAPES["several images"], torch.float32), neighbourhoods(scatter, SHAPES["several images"])
    upstream = torch.randn(5, 19, 2, 16).to(DEVICE)
    expected, _ = both(args, near, upstream)
    monkeypatch.setattr(kernels, "GRID_Z", 2)
    found, _ = both(args, near, upstream)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_sums_of_the_gradients_of_queries_and_result(scatter) -> None:
    args, near = inputs(SHAPES["several images"], torch.float32), neighbourhoods(scatter, SHAPES["several images"])
    qkv, key, value, weight, bias = (a.detach() for a in args)
    out, lse = kernels.forward(qkv, near, weight, bias, key, value)
    dout = torch.randn_like(out)
    dqkv, *_, dq_sum, dout_sum = kernels.backward(dout, qkv, near, weight, bias, key, value, out, lse)
    torch.testing.assert_close(dq_sum, dqkv[:, :, 0].sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dout_sum, dout.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 14.0])
def test_extreme_logits_are_finite_and_no_worse_than_sdpa(scatter, dtype, scale) -> None:
    """scale 14 gives logits of about +-1e3; the neighbourhood is full, so SDPA does the same."""
    shape = ((9, 7), 61, 64, 1, 2, 32)
    args, near = inputs(shape, dtype, scale=scale), neighbourhoods(scatter, shape)
    args[3:] = [a.detach().clamp(-100, 100).requires_grad_() for a in args[3:]]
    upstream = torch.randn(1, 61, 2, 32).to(DEVICE, dtype)
    found, exact = both(args, near, upstream)
    assert all(torch.isfinite(tensor).all() for tensor in found)
    theirs = sdpa(*(a.detach() for a in args), near)
    limit = (theirs.double() - exact[0]).norm() / exact[0].norm()
    assert error(found[0], exact[0]) <= 1.1 * limit + 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 100.0, 1000.0])
def test_no_scale_gives_nan_or_inf(scatter, dtype, scale) -> None:
    shape = ((3, 11), 19, 16, 1, 2, 32)  # a short tail
    args, near = inputs(shape, dtype, scale=scale), neighbourhoods(scatter, shape)
    out = cluster_attention(args[0], near, *args[1:], backend="triton")
    assert all(torch.isfinite(g).all() for g in (out, *torch.autograd.grad(out, args, torch.ones_like(out) * 1e-3)))


def sdpa(qkv, blank_key, blank_value, bias_weight, bias, near):
    """PyTorch's own attention in the dtype of `qkv`, with the bias as an additive mask."""
    batch, _, _, heads, _ = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    blank = [x.to(qkv.dtype)[None, :, None].expand(batch, heads, 1, -1) for x in (blank_key, blank_value)]
    delta = (near.pos_BN2[:, None] - near.pos_BN2[:, :, None]).double()
    d = delta.norm(dim=-1, keepdim=True)
    geometry = torch.cat([delta, d, torch.nan_to_num(delta.flip(-1) / d)], -1)
    additive = torch.einsum("bnmf,hf->bhnm", geometry, bias_weight.double()) + bias.double()[:, None, None]
    mask = F.pad(additive, (0, 1)).to(qkv.dtype)
    key, value = torch.cat([key, blank[0]], 2), torch.cat([value, blank[1]], 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def test_what_the_kernel_does_not_take_is_named(scatter) -> None:
    shape = ((4, 4), 9, 64, 1, 2, 8)
    args, near = inputs(shape, torch.float32), neighbourhoods(scatter, shape)
    with pytest.raises(ValueError, match="does not take heads of width 8, only of 16, 32 or 64"):
        cluster_attention(args[0], near, *args[1:], backend="triton")
    double = [a.detach().double() for a in inputs(SHAPES["one token"], torch.float32)]
    near = neighbourhoods(scatter, SHAPES["one token"])
    with pytest.raises(ValueError, match=r"does not take features of torch\.float64"):
        cluster_attention(double[0], near, *double[1:], backend="triton")
