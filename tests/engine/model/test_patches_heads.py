"""Patches, padding, heads and the collapse signal."""

import pytest
import torch

from affmae_engine.model.affmae import class_head_from_pixel_head
from affmae_engine.model.collapse import effective_rank
from affmae_engine.model.patches import canvas_of, pad_to_patches, patchify, real_pixels, unpatchify


def test_patchify_round_trip_and_layout() -> None:
    image = torch.arange(2 * 3 * 16 * 24).view(2, 3, 16, 24)
    patches = patchify(image, 8)
    assert patches.shape == (2, 6, 192)
    assert torch.equal(unpatchify(patches, (2, 3), 8), image)
    row, column, channel = 5, 2, 1  # inside patch (1, 2), the last one
    assert patches[1, 5, (row * 8 + column) * 3 + channel] == image[1, channel, 8 + row, 16 + column]


def test_padding_repeats_the_border_inside_its_own_patch() -> None:
    image = torch.arange(15.0).view(1, 1, 3, 5)
    padded = pad_to_patches(image, 4)
    assert canvas_of(3, 5, 4) == (1, 2) and padded.shape == (1, 1, 4, 8)
    assert padded[0, 0, 3].tolist() == [10, 11, 12, 13, 14, 14, 14, 14]
    assert pad_to_patches(padded, 4) is padded
    real = real_pixels(3, 5, 4, torch.device("cpu"))
    assert real.shape == (1, 2, 16) and real.sum() == 15


def test_class_head_repeats_the_pixel_head_per_class() -> None:
    weight, bias = torch.randn(4 * 4, 6), torch.randn(16)
    new_weight, new_bias = class_head_from_pixel_head(weight, bias, 3, 1, 4, torch.Generator().manual_seed(0))
    assert new_weight.shape == (48, 6) and new_bias.shape == (48,)
    noise = new_weight.view(16, 3, 6) - weight[:, None]
    assert noise.std() == pytest.approx(1e-4, rel=0.2) and new_weight[0].ne(new_weight[1]).any()
    again = class_head_from_pixel_head(weight, bias, 3, 1, 4, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], new_weight) and torch.equal(again[1], new_bias)


def test_class_head_averages_image_channels_and_checks_rows() -> None:
    weight = torch.tensor([[1.0], [3.0], [5.0], [7.0], [0.0], [0.0], [2.0], [2.0]])
    new_weight, _ = class_head_from_pixel_head(weight, torch.zeros(8), 2, 2, 2)
    torch.testing.assert_close(new_weight.flatten(), torch.tensor([2.0, 2, 6, 6, 0, 0, 2, 2]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"1 channels and patches of 2 has 4 rows; got weight \[8, 1\]"):
        class_head_from_pixel_head(weight, torch.zeros(8), 2, 1, 2)


def test_effective_rank_of_known_spectra() -> None:
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, 8) + 3
    torch.manual_seed(0)
    full = torch.linalg.qr(torch.randn(50, 8) - 0.0)[0]
    full = full - full.mean(0)
    rank = effective_rank(torch.stack([line, full, torch.full((50, 8), 2.0)]))
    assert rank[0] == pytest.approx(1.0, abs=1e-3)
    assert 7.5 < rank[1] <= 8.0001
    assert rank[2] == pytest.approx(1.0)
    assert effective_rank(line[None].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max])
def test_effective_rank_of_features_that_overflowed_is_not_a_number(value: float) -> None:
    feat = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    expected = effective_rank(feat)
    feat[1, 7:20, 3] = value  # so that the largest of all overflows in the mean
    rank = effective_rank(feat)
    assert rank[1].isnan()
    torch.testing.assert_close(rank[[0, 2]], expected[[0, 2]])
