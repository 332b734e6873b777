"""Adding weighted tiles to the planes that they were cut from."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.tile_blending import reference

__all__ = ["blend_tiles"]


def blend_tiles(
    sums_ZCYX: Tensor,
    tiles_BCTT: Tensor,
    weight_y_BT: Tensor,
    weight_x_BT: Tensor,
    origin_B3: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Add a batch of tiles in place; where tiles overlap, they are added in the order of the batch.

        sums[z_b, c, y_b + i, x_b + j] += weight_y[b, i] weight_x[b, j] tiles[b, c, i, j]

    Args:
        sums_ZCYX: fp32 [Z, C, Y, X], contiguous; the reference takes float64 as well.
        tiles_BCTT: [B, C, T, T], floating.
        weight_y_BT, weight_x_BT: [B, T], floating.
        origin_B3: int32 [B, 3], the place (z, y, x) of a tile's first pixel. A tile may reach beyond the planes, at any
            side; that part of it is left out. A tile with z = -1 (the padding of a batch) is left out as a whole.
        backend: see `affmae_kernels.dispatch`.

    Gradients: none.

    Raises:
        ValueError: when shapes or dtypes do not fit together.
    """
    if sums_ZCYX.ndim != 4 or tiles_BCTT.ndim != 4 or not sums_ZCYX.is_contiguous():
        raise ValueError(
            f"sums must be contiguous [Z, C, Y, X] and tiles [B, C, T, T]; got {list(sums_ZCYX.shape)} and "
            f"{list(tiles_BCTT.shape)}"
        )
    batch, classes, tile, _ = tiles_BCTT.shape
    fit = sums_ZCYX.shape[1] == classes and tiles_BCTT.shape[3] == tile
    if not fit or not weight_y_BT.shape == weight_x_BT.shape == (batch, tile) or origin_B3.shape != (batch, 3):
        raise ValueError(
            f"tiles {list(tiles_BCTT.shape)} need sums [Z, {classes}, Y, X], weights [{batch}, {tile}] and origins "
            f"[{batch}, 3]; got {list(sums_ZCYX.shape)}, {list(weight_y_BT.shape)}, {list(weight_x_BT.shape)} and "
            f"{list(origin_B3.shape)}"
        )
    if origin_B3.dtype != torch.int32 or not sums_ZCYX.is_floating_point() or not tiles_BCTT.is_floating_point():
        raise ValueError(
            f"sums and tiles must be floating and origins int32; got {sums_ZCYX.dtype}, {tiles_BCTT.dtype} and "
            f"{origin_B3.dtype}"
        )
    unsupported = None
    if sums_ZCYX.dtype != torch.float32 or tiles_BCTT.dtype not in DTYPES:
        unsupported = f"sums of {sums_ZCYX.dtype} and tiles of {tiles_BCTT.dtype}"
    choice = choose_backend(backend, "tile_blending", sums_ZCYX.device, unsupported)
    with torch.no_grad():
        if choice.name == "triton":
            from affmae_kernels.tile_blending import triton

            triton.blend_tiles(sums_ZCYX, tiles_BCTT, weight_y_BT, weight_x_BT, origin_B3)
        else:
            reference.blend_tiles(sums_ZCYX, tiles_BCTT, weight_y_BT, weight_x_BT, origin_B3)
