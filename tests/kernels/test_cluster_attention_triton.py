"""Cluster attention's kernels against the float64 reference: odd shapes, every gradient, extreme numbers, same bits."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.neighbourhoods import build

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = [pytest.param(dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)]
DTYPES = [torch.float32, *HALF]
NAMES = ("qkv", "blank_key", "blank_value", "bias_weight", "bias")
ON_CARD = DEVICE == "cuda"  # the interpreter takes a second for what a card does in no time
# canvas, tokens, neighbours, batch, heads, head width
SHAPES = {
    "one cluster": ((4, 4), 5, 64, 2, 2, 32),
    "one token": ((3, 3), 1, 64, 1, 1, 16),
    "fewer tokens than neighbours": ((7, 6), 37, 64, 2, 4 if ON_CARD else 2, 32),
    "short tail, flat canvas": ((5, 23), 83, 16, 1, 3, 32),
    "wide heads": ((9, 8), 50, 24, 2, 2, 64),
    "narrow heads": ((8, 9), 49, 32, 1, 5 if ON_CARD else 3, 16),
    "several groups": ((16, 9), 129, 64, 1, 4, 32) if ON_CARD else ((12, 9), 97, 64, 1, 1, 32),
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
    return build(scatter(batch, tokens, canvas, seed).to(DEVICE), canvas, neighbours=neighbours, backend="reference")[1]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference_forward_and_every_gradient(scatter, shape, dtype) -> None:
    args, near = inputs(shape, dtype), neighbourhoods(scatter, shape)
    upstream = torch.randn(args[0].shape[0], args[0].shape[1], *args[0].shape[3:]).to(DEVICE, dtype)
    found, exact = both(args, near, upstream)
    assert found[0].dtype == dtype and [g.dtype for g in found[1:]] == [a.dtype for a in args]
    for name, mine, other in zip(("out", *NAMES), found, exact, strict=True):
        # The bias's gradients are sums over all pairs in which most of the terms cancel.
        limit = LIMITS[dtype] * (5 if name in ("bias_weight", "bias") else 1)
        assert error(mine, other) < limit, name


def test_strided_features_and_gradients(scatter) -> None:
    shape = SHAPES["short tail, flat canvas"]
    args, near = inputs(shape, torch.float32), neighbourhoods(scatter, shape)
    wide = torch.randn(*args[0].shape[:4], 2 * args[0].shape[4]).to(DEVICE)
    args[0] = wide[..., ::2].requires_grad_()
    upstream = torch.randn(args[0].shape[1], args[0].shape[0], *args[0].shape[3:]).to(DEVICE).transpose(0, 1)
    found, exact = both(args, near, upstream)
    assert max(error(mine, other) for mine, other in zip(found, exact, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run(scatter, dtype) -> None:
    shape = SHAPES["several groups" if ON_CARD else "one cluster"]  # the interpreter knows one order only
    runs = []
    for _ in range(2):
        args, near = inputs(shape, dtype), neighbourhoods(scatter, shape)
        out = cluster_attention(args[0], near, *args[1:], backend="triton")
        runs.append((out, *torch.autograd.grad(out, args, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


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
    additive = torch.einsum("bnmf,af->banm", geometry, bias_weight.double()) + bias.double()[:, None, None]
    mask = F.pad(additive, (0, 1)).to(qkv.dtype)
    key, value = torch.cat([key, blank[0]], 2), torch.cat([value, blank[1]], 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def test_operator_is_one_node_of_a_compiled_graph(scatter) -> None:
    shape = SHAPES["one cluster"]
    args, near = inputs(shape, torch.float32), neighbourhoods(scatter, shape)
    plain = cluster_attention(args[0], near, *args[1:], backend="triton")
    compiled = torch.compile(
        lambda q, *rest: cluster_attention(q * 1.0, near, *rest, backend="triton") * 1.0,
        backend="aot_eager",
        fullgraph=True,
    )(*args)
    upstream = torch.randn_like(plain)
    for mine, other in zip(
        torch.autograd.grad(compiled, args, upstream), torch.autograd.grad(plain, args, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_what_the_kernel_does_not_take_is_named(scatter) -> None:
    shape = ((4, 4), 9, 64, 1, 2, 8)
    args, near = inputs(shape, torch.float32), neighbourhoods(scatter, shape)
    with pytest.raises(ValueError, match="does not take heads of width 8, only of 16, 32 or 64"):
        cluster_attention(args[0], near, *args[1:], backend="triton")
    double = [a.detach().double() for a in inputs(SHAPES["one token"], torch.float32)]
    near = neighbourhoods(scatter, SHAPES["one token"])
    with pytest.raises(ValueError, match=r"does not take features of torch\.float64"):
        cluster_attention(double[0], near, *double[1:], backend="triton")
