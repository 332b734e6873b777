"""Sums over rows against float64, on shapes of one pass and of two."""

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.bfloat16, torch.float16))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (130, 17), (700, 20), (2113, 33), (9000, 3)])
def test_sums_of_columns(shape, dtype, monkeypatch) -> None:
    from affmae_kernels import column_sums

    monkeypatch.setattr(column_sums, "PROGRAMS", 8)  # two passes without thousands of interpreted programs
    torch.manual_seed(0)
    x = torch.randn(shape).to(DEVICE, dtype)
    found = column_sums.column_sums(x)
    exact = x.double().sum(0)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, atol=1e-4 * shape[0] ** 0.5, rtol=1e-5)
