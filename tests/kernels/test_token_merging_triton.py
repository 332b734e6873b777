"""Token merging's kernels beyond the cases of `affmae_kernels.token_merging.cases`."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.neighbourhoods import build_neighbourhoods
from affmae_kernels.token_merging import merge_tokens, select_survivors

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]
NAMES = ("feat", "score", "weight", "bias", "norm_weight", "norm_bias")
# canvas, tokens, neighbours, batch, channels, survivors
SHAPES = {
    "all survive": ((6, 7), 29, 24, 2, 48, 29),
    "several groups": ((12, 9), 97, 64, 1, 32, 65),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """So that each takes several groups of the weights' gradient."""
    monkeypatch.setattr("affmae_kernels.token_merging.triton.WEIGHT_PROGRAMS", 3)


def problem(scatter, shape, dtype, scale=1.0):
    """(differentiable arguments, survivors, neighbourhoods)."""
    canvas, tokens, neighbours, batch, channels, survivors = shape
    torch.manual_seed(0)
    pos = scatter(batch, tokens, canvas).to(DEVICE)
    _, near = build_neighbourhoods(pos, canvas, neighbours=neighbours, backend="reference")
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
def test_programs_that_take_several_groups(scatter, dtype) -> None:
    shape = SHAPES["several groups"]
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


@pytest.mark.gpu  # the interpreter knows one order only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_in_every_run(scatter, dtype) -> None:
    shape = SHAPES["several groups"]
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


VALUES = {
    "NaN and infinities": [float("nan"), 1.0, float("inf"), -float("inf"), float("nan"), -1.0, 0.0, 2.0],
    "zeros of both signs": [0.0, -0.0, -0.0, 0.0, -1e-45, 1e-45, -0.0, 0.0],
    "negative": [-1.0, -2.0, -3e38, -1e-30, -1.0, -5.0, -4.0, -2.0],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("in_registers", [True, False])
def test_survivors_of_unusual_values(scatter, monkeypatch, value, in_registers) -> None:
    if not in_registers:  # several blocks of tokens
        monkeypatch.setattr("affmae_kernels.token_merging.survivors.IN_REGISTERS", 0)
        monkeypatch.setattr("affmae_kernels.token_merging.survivors.LOOP_BLOCK", 16)
    pos = scatter(2, 40, (7, 8)).to(DEVICE)
    _, near = build_neighbourhoods(pos, (7, 8), backend="reference")
    value_BN = torch.tensor(value).repeat(2, 5).to(DEVICE)
    for count in (1, 13, 39, 40):
        expected = select_survivors(value_BN, near, count, backend="reference")
        assert torch.equal(select_survivors(value_BN, near, count, backend="triton"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2048, 16_384, 20_000, 65_536])
def test_survivors_of_large_images(scatter, tokens) -> None:
    pos = scatter(2, tokens, (256, 256)).cuda()
    _, near = build_neighbourhoods(pos, (256, 256), backend="triton")
    value_BN = (torch.rand(2, tokens, device="cuda") * 1000).round() / 1000
    count = int(0.4 * tokens)
    expected = select_survivors(value_BN, near, count, backend="reference")
    assert torch.equal(select_survivors(value_BN, near, count, backend="triton"), expected)
