"""The stem op beyond its cases: the reference against a patch computed by hand, masked pixels, bad input."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.cases import Case, cases, solve
from affmae_kernels.stem import stem, unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]


def arguments(case: Case | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of a case (5 x 4 canvas, 11 visible) without gradients."""
    made = (case or cases("stem")[0]).make(torch.Generator().manual_seed(0), dtype)
    return {**made, "patch": 8}


def alone(pixels_Ipp: Tensor, convs: list, norms: list, *, inside: bool) -> Tensor:
    """A patch whose neighbors are all masked (inside the image) or that is the whole image, by padded convolutions."""
    x_1CHW = pixels_Ipp[None]
    rim_C = torch.zeros(len(pixels_Ipp))
    for layer, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        edge = x_1CHW.shape[-1]
        framed_1CHW = rim_C[None, :, None, None].expand(1, -1, edge + 1, edge + 1).clone()
        framed_1CHW[:, :, 1:, 1:] = x_1CHW
        x_1HWC = F.conv2d(framed_1CHW, *conv, stride=2).permute(0, 2, 3, 1)
        x_1HWC = F.layer_norm(x_1HWC, norm[0].shape, *norm)
        if layer < len(convs) - 1:
            x_1HWC = F.gelu(x_1HWC)
        x_1CHW = x_1HWC.permute(0, 3, 1, 2)
        rim_C = F.gelu(norm[1]) if inside else torch.zeros_like(norm[1])
    return x_1CHW.flatten()


@pytest.mark.parametrize("inside", [True, False])
def test_patch_alone_equals_convolutions_by_hand(inside: bool) -> None:
    made = arguments()
    image_BIHW = made["image_BIHW"][:1] if inside else made["image_BIHW"][:1, :, :8, :8]
    cell = 9 if inside else 0  # of a canvas of 4 columns: row 2, column 1
    y, x = (16, 8) if inside else (0, 0)
    found = stem(image_BIHW, torch.tensor([[cell]]), made["convs"], made["norms"], 8)
    expected = alone(image_BIHW[0, :, y : y + 8, x : x + 8], made["convs"], made["norms"], inside=inside)
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_result_is_the_same() -> None:
    case = cases("stem")[0]
    made = case.arguments(DEVICE, torch.float32)
    expected = case.call(backend="triton", **made)["feat_BVC"]
    with torch.no_grad():
        assert torch.equal(case.call(backend="triton", **made)["feat_BVC"], expected)


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_all_patches_visible_equals_no_list(patch: int) -> None:
    torch.manual_seed(patch)
    widths = [1] + [4] * (patch.bit_length() - 2) + [8]
    convs = [(torch.randn(b, a, 3, 3).double(), torch.randn(b).double()) for a, b in pairwise(widths)]
    norms = [(torch.randn(b).double(), torch.randn(b).double()) for b in widths[1:]]
    image_BIHW = torch.randn(1, 1, 3 * patch, 5 * patch).double()
    listed, unlisted = (stem(image_BIHW, visible, convs, norms, patch) for visible in (torch.arange(15)[None], None))
    torch.testing.assert_close(listed, unlisted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_pixels_may_be_nan(backend: str) -> None:
    case = cases("stem")[0]
    canvas_hw = 5, 4

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        made = case.make(random, dtype)
        visible_BT = torch.zeros(2, 20, dtype=torch.bool).scatter(1, made["visible_BV"], True)
        pixels = visible_BT.view(2, 1, *canvas_hw).repeat_interleave(8, 2).repeat_interleave(8, 3)
        return {**made, "image_BIHW": made["image_BIHW"].masked_fill(~pixels, float("nan"))}

    spoiled = dataclasses.replace(case, make=make)
    expected = solve(case, DEVICE, torch.float32, backend)
    for name, tensor in solve(spoiled, DEVICE, torch.float32, backend).items():
        assert torch.equal(tensor, expected[name]), name


def test_result_has_the_dtype_of_autocast() -> None:
    made = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        feat_BVC = stem(**made)
    assert feat_BVC.dtype == torch.bfloat16
    torch.testing.assert_close(feat_BVC.float(), stem(**made), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 6}, "patch must be a power of two from 2; got 6"),
        ({"patch": 16}, "patch 16 takes 4 convs and norms; got 3 and 3"),
        ({"image_BIHW": torch.zeros(2, 1, 41, 32)}, "its sides multiples of 8"),
        ({"image_BIHW": torch.zeros(2, 3, 40, 32)}, r"convs\[0\] must be \[C', 3, 3, 3\]"),
        ({"visible_BV": torch.zeros(2, 3, dtype=torch.int32)}, r"visible_BV must be int64 \[2, V\]"),
        ({"visible_BV": torch.zeros(1, 3, dtype=torch.int64)}, r"visible_BV must be int64 \[2, V\]"),
        ({"norms": [(torch.ones(16), torch.ones(4))] * 3}, r"norms\[0\] must be two of \[16\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stem(**{**arguments(), **change})


def test_what_the_kernels_do_not_take() -> None:
    def convs(*widths: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(b, a, 3, 3), torch.zeros(b)) for a, b in pairwise(widths)]

    assert unsupported(torch.bfloat16, convs(1, 64, 64, 128), 8) is None
    assert unsupported(torch.float64, convs(1, 64, 64, 128), 8) == "features of torch.float64"
    assert unsupported(torch.bfloat16, convs(1, 64, 128), 4) == "patches of 4 pixels, only of 8 and 16"
    assert unsupported(torch.bfloat16, convs(5, 64, 64, 128), 8) == "5 image channels, only up to 4"
    assert unsupported(torch.bfloat16, convs(1, 40, 40, 80), 8) is not None
    assert unsupported(torch.bfloat16, convs(1, 144, 144, 288), 8) is not None
