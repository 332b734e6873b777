"""The choice of an implementation, and the tiles that bound memory."""

import pytest
import torch

import affmae_kernels.precision as precision
from affmae_kernels.dispatch import choose_backend


def test_choice_has_a_reason() -> None:
    assert choose_backend("reference", "x").reason == "asked for"
    assert choose_backend("auto", "x").name == "reference" and choose_backend("auto", "x").reason


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend of x must be one of auto, reference; got 'tpu'"):
        choose_backend("tpu", "x")


def test_tiles_cover_all_rows_in_order(monkeypatch) -> None:
    monkeypatch.setattr(precision, "TILE_ELEMENTS", 30)
    seen: list[int] = []

    def rows(part: slice) -> torch.Tensor:
        seen.append(part.stop - part.start)
        return torch.arange(part.start, part.stop)

    with torch.no_grad():
        assert precision.in_tiles(10, 8, rows, dim=0).tolist() == list(range(10))
    assert seen == [3, 3, 3, 1]
    assert precision.in_tiles(10, 1000, rows, dim=0).tolist() == list(range(10))


def test_features_of_half_precision_are_computed_in_fp32() -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [precision.compute_dtype(torch.zeros(1, dtype=d)) for d in dtypes] == [torch.float32] * 3 + [torch.float64]
