"""Warped crops in plain PyTorch. Axes: B samples, N pixels of all planes, 2 = (y, x), H W output pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from affmae_kernels.training_crops import standardize

if TYPE_CHECKING:
    from affmae_kernels.warped_crops import Planes


def warped_crops(planes: Planes, place_B2HW: Tensor, intensity_B4: Tensor, outside: int) -> tuple[Tensor, Tensor]:
    """See the package."""
    place_B2HW, beyond_B2HW = fold(place_B2HW, planes.shape_B2[..., None, None])
    last_B2 = planes.shape_B2 - 1

    def at(values_N: Tensor, place_B2HW: Tensor) -> Tensor:
        kept_B2HW = place_B2HW.long() - planes.start_B2[..., None, None]
        row_BHW, column_BHW = kept_B2HW.unbind(1)
        return values_N[planes.offset_B[:, None, None] + row_BHW * planes.width_B[:, None, None] + column_BHW]

    # Interpolate the normalized gray values of the four pixels around each place.
    mean, std = intensity_B4[:, 0, None, None], intensity_B4[:, 1, None, None]
    first_B2HW = place_B2HW.floor()
    v, u = (place_B2HW - first_B2HW).unbind(1)
    second_B2HW = torch.minimum(first_B2HW + 1, last_B2[..., None, None].to(place_B2HW.dtype))
    top, left = first_B2HW.unbind(1)
    below, beside = second_B2HW.unbind(1)

    def gray_at(y: Tensor, x: Tensor) -> Tensor:
        return standardize(at(planes.gray_N, torch.stack([y, x], 1)), mean, std)

    upper = gray_at(top, left) + u * (gray_at(top, beside) - gray_at(top, left))
    lower = gray_at(below, left) + u * (gray_at(below, beside) - gray_at(below, left))
    labels_BHW = at(planes.labels_N, place_B2HW.round()).long()
    return upper + v * (lower - upper), labels_BHW.masked_fill(beyond_B2HW.any(1), outside)


def fold(coordinate: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror coordinates into [0, length - 1] about the outermost pixels, and say which ones lay outside the image.

    Args:
        coordinate: in pixels.
        length: of the image along this axis, whole numbers that broadcast with the coordinates.
    """
    outside = (coordinate < -0.5) | (coordinate > length - 0.5)
    last = (length - 1).to(coordinate.dtype)
    period = (2 * last).clamp(min=1)
    folded = coordinate - period * (coordinate / period).floor()
    return torch.where(length > 1, torch.minimum(folded, period - folded), 0.0), outside
