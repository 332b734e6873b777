"""Adding weighted tiles in plain PyTorch, one after the other. On a GPU it waits for the origins."""

from __future__ import annotations

from torch import Tensor


def blend_tiles(
    sums_ZCYX: Tensor, tiles_BCTT: Tensor, weight_y_BT: Tensor, weight_x_BT: Tensor, origin_B3: Tensor
) -> None:
    """See the package for the formula and the shapes."""
    height, width = sums_ZCYX.shape[2:]
    tile = tiles_BCTT.shape[-1]
    for b, (z, y, x) in enumerate(origin_B3.tolist()):
        y0, y1, x0, x1 = max(0, y), min(height, y + tile), max(0, x), min(width, x + tile)
        if z < 0 or y0 >= y1 or x0 >= x1:
            continue
        inside_y, inside_x = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
        weight_YX = weight_y_BT[b, inside_y, None] * weight_x_BT[b, inside_x]
        piece_CYX = tiles_BCTT[b, :, inside_y, inside_x].to(sums_ZCYX.dtype)
        sums_ZCYX[z, :, y0:y1, x0:x1].addcmul_(piece_CYX, weight_YX.to(sums_ZCYX.dtype))
