"""Residual LayerNorm beyond its cases: the reference against PyTorch's layers, extreme scales, dropout's share."""

import pytest
import torch
import torch.nn.functional as F

from affmae_kernels import residual_norm as package


def residual_norm(*args, **options):
    """The normalised sum alone."""
    return package.residual_norm(*args, **options)[0]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("poison")


def inputs(shape, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    x, branch = (torch.randn(shape) * scale + 0.3 for _ in range(2))
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    return [t.to(DEVICE).requires_grad_() for t in (x.to(dtype), branch.to(dtype), weight, bias)]


def error(found, exact) -> float:
    assert torch.isfinite(found).all()
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


def test_reference_is_a_sum_and_a_layer_norm() -> None:
    args = [a.detach().double().requires_grad_() for a in inputs((2, 3, 7))]
    x, branch, weight, bias = args
    torch.testing.assert_close(
        residual_norm(*args, backend="reference"), F.layer_norm(x + branch, (7,), weight, bias, 1e-5)
    )
    assert torch.autograd.gradcheck(lambda *a: residual_norm(*a, backend="reference"), args)


def test_what_a_backward_pass_can_also_write() -> None:
    """y again, and the sum of the branch's gradient."""
    pytest.importorskip("triton")
    from affmae_kernels.residual_norm import triton

    x, branch, weight, bias = (a.detach() for a in inputs((9, 40)))
    y, total, stat = triton.forward(x, weight, bias, branch=branch)
    found = triton.backward(torch.randn_like(x), None, total, stat, weight, bias=bias, sum_branch=True)
    torch.testing.assert_close(found.y, y, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.doffset, found.dbranch.sum(0))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_the_features_does_not_matter(scale) -> None:
    pytest.importorskip("triton")
    args = inputs((4, 64), scale=scale)
    exact = residual_norm(*(a.detach().double() for a in args), backend="reference")
    assert error(residual_norm(*args, backend="triton"), exact) < 1e-4


def test_dropout_keeps_its_share_and_its_mask_in_the_gradient() -> None:
    pytest.importorskip("triton")
    x, branch, weight, bias = inputs((64, 256))
    torch.manual_seed(3)
    with torch.no_grad():
        x.zero_(), branch.fill_(1.0), weight.fill_(1.0), bias.zero_()
    y = residual_norm(x, branch, weight, bias, dropout=0.25, backend="triton")
    kept = y > 0  # within a row a dropped element is below the mean
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    assert kept.float().mean(0).std() < 0.1 and kept.float().mean(1).std() < 0.05
    dx, dbranch = torch.autograd.grad(y, (x, branch), torch.randn(64, 256, device=DEVICE))
    torch.testing.assert_close(dbranch, torch.where(kept, dx / 0.75, 0.0))
    torch.manual_seed(3)
    again = residual_norm(x, branch, weight, bias, dropout=0.25, backend="triton")
    other = residual_norm(x, branch, weight, bias, dropout=0.25, backend="triton")
    assert torch.equal(again, y) and not torch.equal(other, y)


def test_wrong_arguments_are_named() -> None:
    x, branch, weight, bias = inputs((4, 8))
    with pytest.raises(ValueError, match=r"must be floating and alike; got .* \[4, 8\] and .* \[3, 8\]"):
        residual_norm(x, branch[:3], weight, bias)
    with pytest.raises(ValueError, match=r"scale_B must be \[4\]; got \[8\]"):
        residual_norm(x, branch, weight, bias, scale_B=weight)
    with pytest.raises(ValueError, match=r"bias_C must be \[8\]; got \[7\]"):
        residual_norm(x, branch, weight, bias[:7])
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\); got 1.0"):
        residual_norm(x, branch, weight, bias, dropout=1.0)
