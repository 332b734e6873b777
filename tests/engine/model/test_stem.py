"""The stem on visible patches against dense convolutions that are masked after every step."""

import pytest
import torch
import torch.nn.functional as F

from affmae_engine.model.patches import take_rows
from affmae_engine.model.encoder import Stem


def dense(stem, image, visible, patch):
    """Convolves the whole image and sets the masked patches to 0 before and after every convolution."""
    batch, _, height, width = image.shape
    hidden = torch.ones(batch, (height // patch) * (width // patch), dtype=torch.bool).scatter(1, visible, False)
    hidden = hidden.view(batch, 1, height // patch, width // patch)

    def blank(x):
        factor = x.shape[-2] // hidden.shape[-2]
        return x.masked_fill(hidden.repeat_interleave(factor, 2).repeat_interleave(factor, 3), 0.0)

    x = blank(image)
    for conv, norm in zip(stem.convs[:-1], stem.norms[:-1], strict=True):
        x = F.gelu(norm(blank(conv(x)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    x = stem.convs[-1](x).flatten(2).transpose(1, 2)
    return stem.norms[-1](take_rows(x, visible))


def randomised(channels, dim, patch):
    """A stem none of whose parameters is a special value."""
    torch.manual_seed(patch)
    stem = Stem(channels, dim, patch).double()
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return stem


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
@pytest.mark.parametrize(("rows", "columns", "visible"), [(3, 5, 7), (4, 4, 16), (1, 6, 1), (5, 2, 9)])
def test_equals_dense_convolutions_masked_after_every_step(patch, rows, columns, visible) -> None:
    stem = randomised(2, 8, patch)
    image = torch.randn(2, 2, rows * patch, columns * patch, dtype=torch.float64)
    index = torch.stack([torch.randperm(rows * columns)[:visible] for _ in range(2)])
    ours, theirs = stem(image, index), dense(stem, image, index, patch)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    parameters = list(stem.parameters())
    for mine, other in zip(
        torch.autograd.grad(ours, parameters, upstream), torch.autograd.grad(theirs, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_all_patches_visible_equals_no_mask() -> None:
    stem = randomised(1, 8, 8)
    image = torch.randn(1, 1, 24, 40, dtype=torch.float64)
    torch.testing.assert_close(stem(image, torch.arange(15)[None]), stem(image, None))


def test_masked_pixels_may_be_nan() -> None:
    stem = randomised(1, 8, 4)
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    visible = torch.tensor([[0, 2, 4, 8]])
    expected = stem(image, visible)
    for cell in {1, 3, 5, 6, 7}:
        y, x = 4 * (cell // 3), 4 * (cell % 3)
        image[..., y : y + 4, x : x + 4] = float("nan")
    torch.testing.assert_close(stem(image, visible), expected)
