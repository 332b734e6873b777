"""Resampling between pixel sizes: bands equal the whole, means are kept, labels come back in place."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from affmae_engine.predict.infer import ArrayPlane, Band
from affmae_engine.predict.rescale import AxisResampling, ResampledPlane, map_back, resampled_shape


@pytest.mark.parametrize(("old", "new"), [(97, 40), (40, 97), (50, 50), (1, 5), (5, 1), (64, 16)])
def test_agrees_with_torch_antialiased_bilinear(old: int, new: int) -> None:
    image = np.random.default_rng(0).normal(size=(old, old + 3)).astype(np.float32)
    plane = ResampledPlane(ArrayPlane(image), (new, new + 1))
    expected = interpolate(
        torch.from_numpy(image)[None, None], (new, new + 1), mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
    assert np.allclose(plane.rows(0, new), expected.numpy(), atol=1e-4)
    pieces = [plane.rows(first, min(new, first + 7)) for first in range(0, new, 7)]
    assert np.allclose(np.concatenate(pieces), plane.rows(0, new), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(97, 40), (40, 97), (1, 9)])
def test_rows_of_the_matrix_sum_to_one(old: int, new: int) -> None:
    matrix = AxisResampling(old, new).matrix
    assert matrix.shape == (new, old)
    assert np.allclose(matrix.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("inner", "outer"), [((40, 30), (160, 90)), ((160, 90), (40, 30)), ((33, 33), (33, 33))])
def test_probabilities_mapped_back_in_bands_equal_the_whole(inner: tuple[int, int], outer: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    planes = [torch.rand((3, *inner), generator=generator).softmax(0) for _ in range(2)]
    bands = [
        Band(index, first, plane[:, first : first + 9])
        for index, plane in enumerate(planes)
        for first in range(0, inner[0], 9)
    ]
    seen: dict[int, list[torch.Tensor]] = {}
    for band in map_back(bands, inner, outer):
        assert band.first_row == sum(part.shape[1] for part in seen.setdefault(band.plane, []))
        seen[band.plane].append(band.probabilities_CRX)
    for index, plane in enumerate(planes):
        whole = torch.cat(seen[index], 1)
        assert whole.shape == (3, *outer)
        expected = interpolate(plane[None], outer, mode="bilinear", antialias=True, align_corners=False)[0]
        assert torch.allclose(whole, expected, atol=1e-5)
        assert torch.allclose(whole.sum(0), torch.ones(outer), atol=1e-5)


def test_resampled_shape_is_never_empty() -> None:
    assert resampled_shape((100, 51), (4.0, 4.0), (8.0, 8.0)) == (50, 26)
    assert resampled_shape((1, 1), (1.0, 1.0), (50.0, 50.0)) == (1, 1)
