"""Bias and activation in one kernel, against PyTorch's functions in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels import activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]
SHAPES = [(1, 1), (19, 130), (67, 48)]
pytestmark = pytest.mark.usefixtures("poison")


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, bias and the gradient of the result."""
    torch.manual_seed(0)
    x_NC, dy_NC = (2 * torch.randn(shape) for _ in range(2))
    return x_NC.to(DEVICE, dtype), torch.randn(shape[1]).to(DEVICE), dy_NC.to(DEVICE, dtype)


def close(found: torch.Tensor, exact: torch.Tensor, limit: float) -> bool:
    return float((found.double() - exact).norm() / exact.norm()) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, bias, dy = inputs(shape, dtype)
    exact_x, exact_bias = (t.double().requires_grad_() for t in (x, bias))
    exact_y = F.gelu(exact_x + exact_bias)
    exact_dx, exact_dbias = torch.autograd.grad(exact_y, (exact_x, exact_bias), dy.double())

    y = activations.gelu_forward(x, bias)
    dx, again, dbias = activations.gelu_backward(dy, x, bias, recompute=True)
    assert y.dtype == dx.dtype == dtype and dbias.dtype == torch.float32
    assert close(y, exact_y.detach(), LIMITS[dtype]) and close(dx, exact_dx, LIMITS[dtype])
    assert close(dbias, exact_dbias, 1e-5)
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    assert activations.gelu_backward(dy, x, bias, recompute=False)[1] is None


@pytest.mark.parametrize("value", [-1e4, -40.0, 0.0, 40.0, 1e4])
def test_gelu_of_extreme_values(value: float) -> None:
    x, bias = torch.full((3, 20), value, device=DEVICE), torch.zeros(20, device=DEVICE)
    dx, _, _ = activations.gelu_backward(torch.ones_like(x), x, bias, recompute=False)
    torch.testing.assert_close(activations.gelu_forward(x, bias), x.clamp(min=0))
    torch.testing.assert_close(dx, torch.full_like(x, 0.5 if value == 0 else float(value > 0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_relu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, _, dy = inputs(shape, dtype)
    du, dbias = activations.relu_backward(dy, x.relu())
    expected = torch.where(x > 0, dy, 0)
    assert torch.equal(du, expected)
    torch.testing.assert_close(dbias.double(), expected.double().sum(0), rtol=1e-5, atol=1e-4)


def test_nan_stays_nan_behind_a_relu() -> None:
    y, dy = torch.ones(4, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    y[0, 0], dy[1, 1] = float("nan"), float("nan")
    du, dbias = activations.relu_backward(dy, y)
    assert du[1, 1].isnan() and dbias[1].isnan()


def test_the_sum_is_left_to_the_caller() -> None:
    x, bias, dy = inputs((5, 7), torch.float32)
    later = []

    def run(function, *arguments):
        later.append(lambda: function(*arguments))

    assert activations.gelu_backward(dy, x, bias, recompute=False, run=run)[2] is None
    assert activations.relu_backward(dy, x.relu(), run=run)[1] is None
    torch.testing.assert_close(later[1](), torch.where(x > 0, dy, 0).sum(0))
