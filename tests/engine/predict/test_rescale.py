"""Resampling between pixel sizes: windows equal the whole, means are kept, the result is torch's."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from affmae_engine.predict.rescale import AxisResampling, resampled_shape


def resampled(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    for dim, new in ((-2, shape[0]), (-1, shape[1])):
        old = values.shape[dim]
        values = AxisResampling(old, new).apply(values, values.ndim + dim, (0, old), (0, new))
    return values


@pytest.mark.parametrize(("old", "new"), [(97, 40), (40, 97), (50, 50), (1, 5), (5, 1), (64, 16)])
def test_agrees_with_torch_antialiased_bilinear(old: int, new: int) -> None:
    values = torch.randn(2, 3, old, old + 3, generator=torch.Generator().manual_seed(0))
    expected = interpolate(values, (new, new + 1), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(resampled(values, (new, new + 1)), expected, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(97, 40), (40, 97), (1, 9), (9, 1)])
def test_a_window_needs_only_what_is_under_it(old: int, new: int) -> None:
    axis = AxisResampling(old, new)
    values = torch.randn(old, 2, generator=torch.Generator().manual_seed(1))
    whole = axis.apply(values, 0, (0, old), (0, new))
    for first in range(0, new, 7):
        wanted = first, min(new, first + 7)
        held = axis.needed(*wanted)
        assert torch.equal(axis.apply(values[slice(*held)], 0, held, wanted), whole[slice(*wanted)])


@pytest.mark.parametrize(("old", "new"), [(97, 40), (40, 97), (1, 9)])
def test_weights_sum_to_one(old: int, new: int) -> None:
    place, weight = AxisResampling(old, new).taps
    assert place.shape == weight.shape and len(weight) == new
    assert np.allclose(weight.sum(1), 1, atol=1e-6)


def test_resampled_shape_is_never_empty() -> None:
    assert resampled_shape((100, 51), (4.0, 4.0), (8.0, 8.0)) == (50, 26)
    assert resampled_shape((1, 1), (1.0, 1.0), (50.0, 50.0)) == (1, 1)
