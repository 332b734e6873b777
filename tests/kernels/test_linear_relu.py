"""A linear layer and its ReLU: cuBLAS with the kernel against the float64 reference, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from affmae_kernels.linear_relu import linear_relu

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]


def error(found, exact) -> float:
    assert torch.isfinite(found).all()
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


def problem(shape, hidden, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(hidden, shape[-1]) / shape[-1] ** 0.5).to(DEVICE).requires_grad_()
    return x, weight, torch.randn(hidden).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "hidden"), [((1, 1, 16), 8), ((2, 37, 24), 130), ((40, 16), 256)])
def test_equals_the_reference_forward_and_every_gradient(shape, hidden, dtype, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("affmae_kernels.linear_relu.triton_impl.PROGRAMS", 4)  # each takes several tiles
    args = problem(shape, hidden, dtype)
    y = linear_relu(*args, backend="triton")
    upstream = torch.randn(y.shape).to(DEVICE, dtype)
    found = (y, *torch.autograd.grad(y, args, upstream))
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    # Where rounding turns a sum across 0 the slope differs: the exact answer takes the slope that the result shows.
    exact_args = [a.detach().double().requires_grad_() for a in args]
    before = F.linear(*exact_args)
    assert error(y, F.relu(before)) < LIMITS[dtype]
    wanted = torch.autograd.grad(before, exact_args, upstream.double() * (y > 0))
    for name, mine, other in zip(("x", "weight", "bias"), found[1:], wanted, strict=True):
        assert error(mine, other) < LIMITS[dtype], name


def test_reference_is_a_linear_layer_and_its_relu() -> None:
    args = [a.detach().cpu() for a in problem((3, 4, 5), 6, torch.float32)]
    torch.testing.assert_close(linear_relu(*args), F.relu(F.linear(*args)))
    args = [a.double().requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: linear_relu(*a, backend="reference"), args)


def test_computes_in_autocasts_dtype() -> None:
    args = problem((2, 3, 8), 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear_relu(*args, backend="reference")
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), args)] == [torch.float32] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one_and_runs_agree(dtype) -> None:
    pytest.importorskip("triton")
    args = problem((3, 16), 128, dtype)
    first, second = (linear_relu(*args, backend="triton") for _ in range(2))
    upstream = torch.randn(first.shape).to(DEVICE, dtype)
    runs = [torch.autograd.grad(y, args, upstream) for y in (first, second)]
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    broken = args[0].detach().clone()
    broken[0] = float("nan")
    assert torch.isnan(linear_relu(broken.requires_grad_(), *args[1:], backend="triton")[0]).all()


def test_operator_is_one_node_of_a_compiled_graph() -> None:
    pytest.importorskip("triton")
    args = problem((2, 5, 16), 32, torch.float32)
    plain = linear_relu(*args, backend="triton")
    compiled = torch.compile(
        lambda x, *rest: linear_relu(x * 1.0, *rest, backend="triton") * 1.0, backend="aot_eager", fullgraph=True
    )(*args)
    upstream = torch.randn_like(plain)
    for mine, other in zip(
        torch.autograd.grad(compiled, args, upstream), torch.autograd.grad(plain, args, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight_HC must be \[H, C\].* got \[7, 9\] and \[7\] for torch.float32"):
        linear_relu(torch.zeros(4, 8), torch.zeros(7, 9), torch.zeros(7))
