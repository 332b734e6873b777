"""Stored gray values to training images, on the device: normalize, resize, CLAHE, turn.

Data-loading processes read crops as they are stored; everything that costs arithmetic happens here, for a whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.training_crops import reference
from affmae_kernels.training_crops.reference import BINS, OUTLIER, TILE, standardize

__all__ = ["BINS", "OUTLIER", "TILE", "equalize", "standardize", "training_crops"]

_DTYPES = (torch.uint8, torch.float32)


def training_crops(
    crop_BYX: Tensor, window_B2: Tensor, intensity_B4: Tensor, size: int, *, clahe: bool = False, backend: str = "auto"
) -> Tensor:
    """Square crops of several sizes as images of one size.

    For the top left [edge, edge] of each crop, in this order:
    1. x = clip((gray value - mean) / std, -OUTLIER, OUTLIER); 0 where std is 0.
    2. Bicubic resizing to [size, size] (a = -0.5), antialiased: when reduced, the filter is as wide as a new pixel.
       Source: Keys 1981; the same as `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`.
    3. With `clahe`, contrast-limited adaptive histogram equalization; see `equalize`.
    4. `turn % 4` quarter turns counterclockwise, then, if `turn` is 4 or more, a mirror image left to right.

    Args:
        crop_BYX: uint8 or float32 [B, E, E], gray values as stored.
        window_B2: int32 [B, 2], (edge, turn) with 1 <= edge <= E and 0 <= turn < 8, which is not checked.
        intensity_B4: float32 [B, 4], (mean, std, low, high): mean and std of the image in gray values; the input range
            of CLAHE in standard deviations from the mean.
        size: edge of the result in pixels.
        clahe: whether to equalize.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        float32 [B, size, size] (float64 where `intensity_B4` is). No gradients.

    Raises:
        ValueError: shapes do not fit together, or the crops have another dtype.
    """
    batch, edge = len(crop_BYX), crop_BYX.shape[-1]
    if crop_BYX.shape != (batch, edge, edge):
        raise ValueError(f"crop_BYX must be [B, E, E]; got {list(crop_BYX.shape)}")
    for name, tensor, shape in (("window_B2", window_B2, (batch, 2)), ("intensity_B4", intensity_B4, (batch, 4))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
    if not crop_BYX.is_floating_point() and crop_BYX.dtype not in _DTYPES:
        raise ValueError(f"crop_BYX must be uint8 or float32; got {crop_BYX.dtype}")
    obstacle = None
    if crop_BYX.dtype not in _DTYPES or intensity_B4.dtype != torch.float32:
        obstacle = f"crops of {crop_BYX.dtype} with intensities of {intensity_B4.dtype}"
    choice = choose_backend(backend, "training_crops", crop_BYX.device, obstacle)
    with torch.no_grad():
        if choice.name == "triton":
            from affmae_kernels.training_crops import triton

            return triton.training_crops(crop_BYX, window_B2, intensity_B4, size, clahe=clahe)
        return reference.training_crops(crop_BYX, window_B2, intensity_B4, size, clahe=clahe)


def equalize(image_BYX: Tensor, low_B: Tensor, high_B: Tensor, *, backend: str = "auto") -> Tensor:
    """Contrast-limited adaptive histogram equalization (CLAHE) of images in standard deviations.

    Gray values are counted in `BINS` bins between `low` and `high`, in tiles of `TILE` x `TILE` pixels (the image is
    reflected to whole tiles). A bin counts at most 1 % of a tile; what is above is spread over the other bins. The
    cumulative counts of a tile map its values to 0..1; between the centers of tiles, maps are interpolated bilinearly.
    Source: Zuiderveld, "Contrast Limited Adaptive Histogram Equalization", Graphics Gems IV, 1994. Close to
    `skimage.exposure.equalize_adapthist`, but the output range does not depend on the image.

    Args:
        image_BYX: floating [B, Y, X], finite.
        low_B, high_B: the range of each image; an image whose range is empty is returned as it is.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        [B, Y, X] of the same dtype, with a mean of about 0 and a deviation of about 1. No gradients.

    Raises:
        ValueError: shapes do not fit together.
    """
    batch, height, width = image_BYX.shape
    if low_B.shape != (batch,) or high_B.shape != (batch,):
        raise ValueError(f"low_B and high_B must be [{batch}]; got {list(low_B.shape)} and {list(high_B.shape)}")
    fitting = height == width and image_BYX.dtype == low_B.dtype == high_B.dtype == torch.float32
    obstacle = None if fitting else f"{image_BYX.dtype} images of {height} x {width} pixels"
    with torch.no_grad():
        if choose_backend(backend, "training_crops", image_BYX.device, obstacle).name == "triton":
            from affmae_kernels.training_crops import triton

            return triton.equalize(image_BYX, low_B, high_B)
        return reference.equalize(image_BYX, low_B, high_B)
