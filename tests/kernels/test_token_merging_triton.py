"""Token merging's kernels against the float64 reference: odd shapes, every gradient, extreme scales, same bits."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.neighbourhoods import build
from affmae_kernels.token_merging import merge_tokens

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]
NAMES = ("feat", "score", "weight", "bias", "norm_weight", "norm_bias")
# canvas, tokens, neighbours, batch, channels, survivors
SHAPES = {
    "one cluster": ((4, 4), 5, 64, 2, 16, 2),
    "one survivor": ((7, 6), 37, 64, 2, 32, 1),
    "short tail, flat canvas": ((5, 23), 83, 16, 1, 96, 33),
    "all survive": ((6, 7), 29, 24, 2, 48, 29),
    "several groups": ((12, 9), 97, 64, 1, 64 if DEVICE == "cuda" else 32, 38),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """So that each takes several groups of the weights' gradient."""
    monkeypatch.setattr("affmae_kernels.token_merging.triton_backward.WEIGHT_PROGRAMS", 3)


def problem(scatter, shape, dtype, scale=1.0):
    """(differentiable arguments, survivors, neighbourhoods)."""
    canvas, tokens, neighbours, batch, channels, survivors = shape
    torch.manual_seed(0)
    pos = scatter(batch, tokens, canvas).to(DEVICE)
    _, near = build(pos, canvas, neighbours=neighbours, backend="reference")
    rows = torch.stack([torch.randperm(tokens)[:survivors].sort().values for _ in range(batch)]).to(DEVICE)
    feat, score = (torch.randn(batch, tokens, channels) * scale).to(dtype), torch.rand(batch, tokens)
    rest = torch.randn(4, 5), torch.randn(4), torch.randn(4), torch.randn(4)
    return [t.to(DEVICE).requires_grad_() for t in (feat, score, *rest)], rows, near


def error(found, exact) -> float:
    assert torch.isfinite(found).all()
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


def run(args, rows, near, upstream, backend):
    """(z, gradients)."""
    z = merge_tokens(*args[:2], rows, near, *args[2:], backend=backend)
    return (z, *torch.autograd.grad(z, args, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference_forward_and_every_gradient(scatter, shape, dtype) -> None:
    args, rows, near = problem(scatter, shape, dtype)
    upstream = torch.randn(shape[3], shape[5], 4 * shape[4]).to(DEVICE, dtype)
    found = run(args, rows, near, upstream, "triton")
    exact_args = [a.detach().double().requires_grad_() for a in args]
    exact = run(exact_args, rows, near, upstream.double(), "reference")
    assert found[0].dtype == dtype and [g.dtype for g in found[1:]] == [a.dtype for a in args]
    for name, mine, other in zip(("z", *NAMES), found, exact, strict=True):
        # The weight network's gradients are sums over all pairs in which most of the terms cancel.
        limit = LIMITS[dtype] * (1 if name in ("z", "feat", "score") else 5)
        assert error(mine, other) < limit, name


def test_strided_arguments(scatter) -> None:
    shape = SHAPES["all survive"]
    args, rows, near = problem(scatter, shape, torch.float32)
    upstream = torch.randn(shape[3], 4 * shape[4], shape[5]).to(DEVICE).mT
    plain = run(args, rows, near, upstream, "triton")
    wide = torch.stack([args[0].detach(), args[0].detach()], -1)
    args[0] = wide[..., 0].requires_grad_()
    args[1] = args[1].detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    for mine, other in zip(run(args, rows, near, upstream, "triton"), plain, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run(scatter, dtype) -> None:
    shape = SHAPES["several groups" if DEVICE == "cuda" else "one cluster"]  # the interpreter knows one order only
    upstream = torch.ones(shape[3], shape[5], 4 * shape[4]).to(DEVICE, dtype)
    runs = [run(*problem(scatter, shape, dtype), upstream, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("scale", [1e-20, 1e10])
def test_scale_of_the_features_does_not_matter(scatter, scale) -> None:
    shape = SHAPES["all survive"]
    args, rows, near = problem(scatter, shape, torch.float32, scale)
    found = merge_tokens(*args[:2], rows, near, *args[2:], backend="triton")
    exact = merge_tokens(*(a.double() for a in args[:2]), rows, near, *(a.double() for a in args[2:]))
    assert error(found, exact) < 1e-5


def test_operator_is_one_node_of_a_compiled_graph(scatter) -> None:
    shape = SHAPES["one cluster"]
    args, rows, near = problem(scatter, shape, torch.float32)

    def function(feat, score, *rest):
        return merge_tokens(feat * 1.0, score, rows, near, *rest, backend="triton") * 1.0

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(*args)
    plain = function(*args)
    upstream = torch.randn_like(plain)
    for mine, other in zip(
        torch.autograd.grad(compiled, args, upstream), torch.autograd.grad(plain, args, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)
