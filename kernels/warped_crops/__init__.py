"""Images and labels at warped places, on the device: fold, normalize, interpolate.

The source is one flat buffer of gray values and one of labels that hold many planes (whole sections kept on the device,
or the windows of a batch), so that one call reads from planes of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.warped_crops import reference

__all__ = ["Planes", "warped_crops"]

_DTYPES = (torch.uint8, torch.float32)
_LABELS = (torch.uint8, torch.int16)


class Planes(NamedTuple):
    """Gray values and labels of planes, and which part of which plane each sample reads.

    A pixel (y, x) of the section of sample b stands at `offset[b] + (y - start[b, 0]) * width[b] + x - start[b, 1]`.
    """

    gray_N: Tensor
    """uint8 or float32."""
    labels_N: Tensor
    """uint8 or int16."""
    offset_B: Tensor
    """int64: of the first pixel that is kept."""
    width_B: Tensor
    """int32: pixels from one kept row to the next."""
    start_B2: Tensor
    """int32: row and column of the first pixel that is kept."""
    shape_B2: Tensor
    """int32: height and width of the whole section."""


def warped_crops(
    planes: Planes, place_B2HW: Tensor, intensity_B4: Tensor, *, outside: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Normalized gray values and labels at places in sections.

    1. Places beyond the outermost pixels are mirrored about them. Labels are `outside` where the place was more than
       half a pixel beyond.
    2. Gray values: clip((gray - mean) / std, -OUTLIER, OUTLIER), 0 where std is 0; interpolated bilinearly.
    3. Labels: those of the nearest pixel; halves round to even.

    Args:
        planes: where the pixels are. Every pixel that a folded place touches has to be kept, which is not checked.
        place_B2HW: float32 (y, x) in pixels of the section.
        intensity_B4: float32 (mean, std, ...) in gray values, as of `training_crops`.
        outside: label of places outside the section.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        image_BHW float32 and labels_BHW int64. No gradients.

    Raises:
        ValueError: shapes do not fit together, or a buffer has another dtype.
    """
    batch = len(place_B2HW)
    if place_B2HW.ndim != 4 or place_B2HW.shape[1] != 2:
        raise ValueError(f"place_B2HW must be [B, 2, H, W]; got {list(place_B2HW.shape)}")
    wanted = {"offset_B": (batch,), "width_B": (batch,), "start_B2": (batch, 2), "shape_B2": (batch, 2)}
    for name, shape in wanted.items():
        if getattr(planes, name).shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(getattr(planes, name).shape)}")
    if planes.gray_N.shape != planes.labels_N.shape or planes.gray_N.ndim != 1:
        raise ValueError("gray_N and labels_N must be flat and of one length")
    if planes.gray_N.dtype not in _DTYPES or planes.labels_N.dtype not in _LABELS:
        raise ValueError(f"unknown dtypes: gray values {planes.gray_N.dtype}, labels {planes.labels_N.dtype}")
    choice = choose_backend(backend, "warped_crops", place_B2HW.device)
    with torch.no_grad():
        if choice.name == "triton":
            from affmae_kernels.warped_crops import triton

            return triton.warped_crops(planes, place_B2HW, intensity_B4, outside)
        return reference.warped_crops(planes, place_B2HW, intensity_B4, outside)
