"""Warped crops in one kernel: a program folds, reads and interpolates a block of places of one sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.training_crops import OUTLIER

if TYPE_CHECKING:
    from affmae_kernels.warped_crops import Planes

BLOCK = 512


@triton.jit
def _fold(place, length):
    """Mirrored into [0, length - 1], and whether it lay more than half a pixel outside."""
    size = length.to(tl.float32)
    outside = (place < -0.5) | (place > size - 0.5)
    period = tl.maximum(2 * (size - 1), 1.0)
    folded = place - period * tl.floor(place / period)
    folded = tl.minimum(tl.maximum(tl.minimum(folded, period - folded), 0.0), size - 1)
    return folded, outside


@triton.jit
def _gray(GRAY, at, mean, unit, inside, OUTLIER: tl.constexpr):
    value = (tl.load(GRAY + at, mask=inside, other=0).to(tl.float32) - mean) * unit
    return tl.minimum(tl.maximum(value, -OUTLIER), OUTLIER)


@triton.jit
def _round(place):
    """The nearest whole number, of two the even one."""
    low = tl.floor(place)
    rest = place - low
    odd = (low.to(tl.int32) & 1) == 1
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1, low).to(tl.int32)


@triton.jit(do_not_specialize=["PIXELS"])
def _warp_kernel(
    GRAY, LABELS, OFFSET, WIDTH, START, SHAPE, PLACE, INTENSITY, IMAGE, TRUTH, PIXELS, OUTSIDE: tl.constexpr,
    OUTLIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = pixel < PIXELS
    height, width = tl.load(SHAPE + 2 * sample), tl.load(SHAPE + 2 * sample + 1)
    first_row, first_column = tl.load(START + 2 * sample), tl.load(START + 2 * sample + 1)
    stride = tl.load(WIDTH + sample).to(tl.int64)
    own = tl.load(OFFSET + sample) - first_row * stride - first_column
    mean, std = tl.load(INTENSITY + 4 * sample), tl.load(INTENSITY + 4 * sample + 1)
    unit = tl.where(std > 0, 1.0 / tl.where(std > 0, std, 1.0), 0.0)

    # Fold. Outside the block, place 0 stands for a pixel that is not read.
    places = PLACE + 2 * sample * PIXELS + pixel
    y, beyond_y = _fold(tl.load(places, mask=inside, other=0.0), height)
    x, beyond_x = _fold(tl.load(places + PIXELS, mask=inside, other=0.0), width)

    # Interpolate.
    top, left = tl.floor(y), tl.floor(x)
    v, u = y - top, x - left
    row, column = top.to(tl.int64), left.to(tl.int64)
    below, beside = tl.minimum(row + 1, height - 1), tl.minimum(column + 1, width - 1)
    top_left = _gray(GRAY, own + row * stride + column, mean, unit, inside, OUTLIER)
    top_right = _gray(GRAY, own + row * stride + beside, mean, unit, inside, OUTLIER)
    bottom_left = _gray(GRAY, own + below * stride + column, mean, unit, inside, OUTLIER)
    bottom_right = _gray(GRAY, own + below * stride + beside, mean, unit, inside, OUTLIER)
    upper = top_left + u * (top_right - top_left)
    lower = bottom_left + u * (bottom_right - bottom_left)
    tl.store(IMAGE + sample * PIXELS + pixel, upper + v * (lower - upper), mask=inside)

    # Labels of the nearest pixels.
    nearest = own + _round(y).to(tl.int64) * stride + _round(x)
    label = tl.load(LABELS + nearest, mask=inside, other=0).to(tl.int64)
    label = tl.where(beyond_y | beyond_x, OUTSIDE, label)
    tl.store(TRUTH + sample * PIXELS + pixel, label, mask=inside)


def warped_crops(planes: Planes, place_B2HW: Tensor, intensity_B4: Tensor, outside: int) -> tuple[Tensor, Tensor]:
    """See the package."""
    batch, _, height, width = place_B2HW.shape
    image_BHW = torch.empty(batch, height, width, dtype=torch.float32, device=place_B2HW.device)
    labels_BHW = torch.empty_like(image_BHW, dtype=torch.int64)
    _warp_kernel[(batch, triton.cdiv(height * width, BLOCK))](
        GRAY=planes.gray_N, LABELS=planes.labels_N, OFFSET=planes.offset_B, WIDTH=planes.width_B,
        START=planes.start_B2.contiguous(), SHAPE=planes.shape_B2.contiguous(), PLACE=place_B2HW.contiguous(),
        INTENSITY=intensity_B4.contiguous(), IMAGE=image_BHW, TRUTH=labels_BHW, PIXELS=height * width, OUTSIDE=outside,
        OUTLIER=OUTLIER, BLOCK=BLOCK,
    )  # fmt: skip
    return image_BHW, labels_BHW
