"""Training crops in plain PyTorch, sample by sample, and CLAHE.

Axes: B samples, Y X pixels, T tiles, K bins of gray values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OUTLIER = 10.0
"""Largest magnitude of a normalized pixel, in standard deviations: one hot pixel must not own the squared error."""

TILE = 64
"""Edge of a CLAHE tile in pixels: an eighth of the paper's 512-pixel image."""

BINS = 256
"""Gray levels that CLAHE tells apart."""

CLIP = 0.01
"""Contrast limit of CLAHE: the largest share of a tile's pixels that counts in one bin."""

CENTER, SCALE = 0.5, 0.25
"""Mean and deviation of equalized values in 0..1, up to some ten per cent; they are subtracted and divided by."""


def training_crops(
    crop_BYX: Tensor, window_B2: Tensor, intensity_B4: Tensor, size: int, *, clahe: bool = False
) -> Tensor:
    """See the package."""
    images = []
    for crop_YX, window, intensity in zip(crop_BYX, window_B2.tolist(), intensity_B4, strict=True):
        edge, turn = window
        image_YX = standardize(crop_YX[:edge, :edge], intensity[0], intensity[1])
        if edge != size:
            image_YX = F.interpolate(
                image_YX[None, None], (size, size), mode="bicubic", align_corners=False, antialias=True
            )[0, 0]
        if clahe:
            image_YX = equalize(image_YX[None], intensity[2:3], intensity[3:4])[0]
        image_YX = torch.rot90(image_YX, turn % 4)
        images.append(image_YX.flip(1) if turn >= 4 else image_YX)
    return torch.stack(images)


def standardize(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gray values in standard deviations from the mean, cut at `OUTLIER`; 0 where there is no deviation."""
    scaled = (values.to(mean.dtype) - mean) / std
    return torch.where(std > 0, scaled.clamp(-OUTLIER, OUTLIER), 0.0)


def equalize(image_BYX: Tensor, low_B: Tensor, high_B: Tensor) -> Tensor:
    """See the package."""
    batch, height, width = image_BYX.shape
    bin_BYX = bins_of(image_BYX, low_B[:, None, None], high_B[:, None, None])

    # Reflect to whole tiles.
    tile_y, tile_x = min(TILE, height), min(TILE, width)
    rows, columns = -(-height // tile_y), -(-width // tile_x)
    y = reflected(torch.arange(rows * tile_y, device=bin_BYX.device), height)
    x = reflected(torch.arange(columns * tile_x, device=bin_BYX.device), width)
    tiles_BTP = bin_BYX[:, y][:, :, x].unflatten(1, (rows, tile_y)).unflatten(3, (columns, tile_x))
    tiles_BTP = tiles_BTP.transpose(2, 3).reshape(batch * rows * columns, tile_y * tile_x)

    # A map of each tile: clipped histogram, summed up.
    ones = torch.ones_like(tiles_BTP, dtype=torch.int32)
    count_TK = torch.zeros(len(tiles_BTP), BINS, dtype=torch.int32, device=tiles_BTP.device)
    count_TK.scatter_add_(1, tiles_BTP, ones)
    count_TK = clipped(count_TK, max(1, int(CLIP * tile_y * tile_x)))
    map_TK = (count_TK.cumsum(1).to(image_BYX.dtype) / (tile_y * tile_x)).clamp(max=1.0)
    map_BRCK = map_TK.reshape(batch, rows, columns, BINS)

    # Interpolate the maps of the four nearest tiles.
    above, below, v = _between_tiles(height, tile_y, rows, image_BYX)
    left, right, u = _between_tiles(width, tile_x, columns, image_BYX)
    sample = torch.arange(batch, device=bin_BYX.device)[:, None, None]

    def mapped(row_Y: Tensor, column_X: Tensor) -> Tensor:
        return map_BRCK[sample, row_Y[:, None], column_X[None], bin_BYX]

    top = (1 - u) * mapped(above, left) + u * mapped(above, right)
    bottom = (1 - u) * mapped(below, left) + u * mapped(below, right)
    equalized = ((1 - v[:, None]) * top + v[:, None] * bottom - CENTER) / SCALE
    return torch.where((high_B > low_B)[:, None, None], equalized, image_BYX)


def bins_of(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The bin of each value, int64 in 0 .. BINS - 1."""
    unit = ((image - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    return (unit * BINS).long().clamp(max=BINS - 1)


def clipped(count_TK: Tensor, limit: int) -> Tensor:
    """Histograms in which no bin exceeds `limit`; what was above is spread evenly over the bins that are below.

    A bin that would exceed the limit by its part of the excess is filled up to it. What is left after that goes to bins
    below the limit at even distances.
    """
    excess_T1 = (count_TK - limit).clamp(min=0).sum(1, keepdim=True)
    count_TK = count_TK.clamp(max=limit)
    filled_TK = (count_TK + excess_T1 // BINS).clamp(max=limit)
    left_T1 = excess_T1 - (filled_TK - count_TK).sum(1, keepdim=True)
    below_TK = filled_TK < limit
    rank_TK = below_TK.cumsum(1)  # 1, 2, ... among the bins below the limit
    number_T1 = rank_TK[:, -1:].clamp(min=1)
    given_TK = rank_TK * left_T1 // number_T1 - (rank_TK - 1) * left_T1 // number_T1
    return torch.where(below_TK, (filled_TK + given_TK).clamp(max=limit), filled_TK).to(count_TK.dtype)


def reflected(index: Tensor, length: int) -> Tensor:
    """Indices mirrored about the first and the last pixel into 0 .. length - 1."""
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    folded = index % period
    return torch.minimum(folded, period - folded)


def _between_tiles(length: int, tile: int, tiles: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel along an axis: the tiles whose centers lie before and after it, and the weight of the second."""
    shifted = torch.arange(length, device=like.device) + tile // 2
    after = shifted // tile
    weight = (shifted % tile).to(like.dtype) / tile
    return (after - 1).clamp(0, tiles - 1), after.clamp(0, tiles - 1), weight
