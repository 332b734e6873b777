"""Weights and their gradients in half precision and fp32."""

import pytest
import torch

from affmae_kernels.products import lowered, rows, weight_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_rows() -> None:
    assert rows(torch.zeros(2, 3, 5)).shape == (6, 5)
    assert rows(torch.zeros(5)).shape == (1, 5)


def test_lowered_weights_are_detached_and_rounded() -> None:
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    found = lowered(weights, torch.bfloat16)
    assert all(torch.equal(low, weight.bfloat16()) for low, weight in zip(found, weights, strict=True))
    assert not any(low.requires_grad for low in found)


def test_weights_of_the_wanted_dtype_are_not_copied() -> None:
    weights = [torch.randn(3, 4, requires_grad=True)]
    (found,) = lowered(weights, torch.float32)
    assert found.data_ptr() == weights[0].data_ptr() and not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_weight_gradient(dtype: torch.dtype) -> None:
    """bf16: summed in fp32 and not rounded."""
    torch.manual_seed(0)
    dout, feat = (torch.randn(300, width).to(DEVICE, dtype) for width in (16, 24))
    found = weight_gradient(dout, feat)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dout.double().t() @ feat.double(), rtol=1e-4, atol=1e-4)
