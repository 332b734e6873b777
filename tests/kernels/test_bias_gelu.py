"""GELU after a bias: kernel against the reference, and the error of the distribution it uses."""

import pytest
import torch
import torch.nn.functional as F

from affmae_kernels.bias_gelu import bias_gelu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]


def error(found, exact) -> float:
    assert torch.isfinite(found).all()
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 37, 130), (40, 256)])
def test_kernel_equals_the_reference_forward_and_every_gradient(shape, dtype) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x = (2 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(shape[-1]).to(DEVICE).requires_grad_()
    upstream = torch.randn(shape).to(DEVICE, dtype)
    y = bias_gelu(x, bias, backend="triton")
    found = (y, *torch.autograd.grad(y, (x, bias), upstream))
    exact_args = [a.detach().double().requires_grad_() for a in (x, bias)]
    exact = bias_gelu(*exact_args, backend="reference")
    exact = (exact, *torch.autograd.grad(exact, exact_args, upstream.double()))
    for mine, other in zip(found, exact, strict=True):
        assert error(mine, other) < LIMITS[dtype]


def test_reference_is_the_exact_gelu() -> None:
    x, bias = torch.randn(3, 4, 5), torch.randn(5)
    torch.testing.assert_close(bias_gelu(x, bias), F.gelu(x + bias))
    args = [a.double().requires_grad_() for a in (x, bias)]
    assert torch.autograd.gradcheck(lambda *a: bias_gelu(*a, backend="reference"), args)


def test_far_from_zero_and_near_it() -> None:
    pytest.importorskip("triton")
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([1e30, -1e30, 1e-30, 0.0])]).to(DEVICE).view(45, 89)
    x.requires_grad_()
    y = bias_gelu(x, torch.zeros(89, device=DEVICE), backend="triton")
    exact = F.gelu(x.detach().double().requires_grad_())
    finite = x.detach().abs() < 1e29
    assert float((y - exact)[finite].abs().max()) < 1e-6
    assert float(y[-1, -4]) == pytest.approx(1e30) and float(y[-1, -3]) == 0
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(slope).all() and float(slope[-1, -4]) == 1 and float(slope[-1, -3]) == 0


def test_y_again_equals_y() -> None:
    pytest.importorskip("triton")
    from affmae_kernels.bias_gelu import triton_impl

    x, bias = torch.randn(50, 200, device=DEVICE), torch.randn(200, device=DEVICE)
    _, again, _ = triton_impl.launch_backward(torch.randn_like(x), x, bias, again=True)
    assert torch.equal(again, triton_impl.launch_forward(x, bias))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"bias_C must be \[C\] .* got \[7\] for torch.float32 \[4, 8\]"):
        bias_gelu(torch.zeros(4, 8), torch.zeros(7))
