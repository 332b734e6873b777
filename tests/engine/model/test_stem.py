"""The stem's parameters and what it does with masked patches; the op's own tests are in tests/kernels."""

import pytest
import torch

from affmae_engine.model.encoder import Stem


def randomized(channels: int, dim: int, patch: int) -> Stem:
    """A stem none of whose parameters is a special value."""
    torch.manual_seed(patch)
    stem = Stem(channels, dim, patch).double()
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return stem


def test_parameter_names_and_shapes() -> None:
    expected = {}
    for i, (channels, width) in enumerate([(2, 8), (8, 8), (8, 16)]):
        expected |= {f"convs.{i}.weight": [width, channels, 3, 3], f"convs.{i}.bias": [width]}
        expected |= {f"norms.{i}.weight": [width], f"norms.{i}.bias": [width]}
    assert {name: list(parameter.shape) for name, parameter in Stem(2, 16, 8).named_parameters()} == expected


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_all_patches_visible_equals_no_mask(patch: int) -> None:
    stem = randomized(1, 8, patch)
    image = torch.randn(1, 1, 3 * patch, 5 * patch, dtype=torch.float64)
    torch.testing.assert_close(stem(image, torch.arange(15)[None]), stem(image, None))


def test_masked_pixels_may_be_nan() -> None:
    stem = randomized(1, 8, 4)
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    visible = torch.tensor([[0, 2, 4, 8]])
    expected = stem(image, visible)
    for cell in {1, 3, 5, 6, 7}:
        y, x = 4 * (cell // 3), 4 * (cell % 3)
        image[..., y : y + 4, x : x + 4] = float("nan")
    torch.testing.assert_close(stem(image, visible), expected)


def test_half_precision_under_autocast() -> None:
    image = torch.randn(1, 1, 24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        feat = Stem(1, 16, 8)(image, torch.tensor([[4, 0, 3]]))
    assert feat.dtype == torch.bfloat16
    assert feat.shape == (1, 3, 16)
