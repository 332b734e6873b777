"""Between images and patches: the canvas, padding, and patchify / unpatchify as an inverse pair.

Axes: B batch, C channels, H W image, h w canvas, T = h * w cells, P = p * p * C values of a patch, laid out as (row,
column, channel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def canvas_of(height: int, width: int, patch: int) -> tuple[int, int]:
    """Canvas (h, w) of an image of `height` x `width` pixels: sides are rounded up to whole patches."""
    return -(-height // patch), -(-width // patch)


def pad_to_patches(image_BCHW: Tensor, patch: int) -> Tensor:
    """Repeats the last row and column until `patch` divides both sides; values never leave their own patch."""
    height, width = image_BCHW.shape[-2:]
    rows, columns = canvas_of(height, width, patch)
    missing = rows * patch - height, columns * patch - width
    if missing == (0, 0):
        return image_BCHW
    return F.pad(image_BCHW, (0, missing[1], 0, missing[0]), mode="replicate")


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, h * p, w * p] -> [B, T, P], cells in canvas order."""
    batch, channels, height, width = image_BCHW.shape
    split = image_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patch_BTP: Tensor, canvas_hw: tuple[int, int], patch: int) -> Tensor:
    """[B, T, P] -> [B, C, h * p, w * p]; the inverse of `patchify`."""
    height, width = canvas_hw
    batch, _, values = patch_BTP.shape
    split = patch_BTP.reshape(batch, height, width, patch, patch, values // patch**2)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * patch, width * patch)


def real_pixels(height: int, width: int, patch: int, device: torch.device) -> Tensor:
    """[1, T, p * p] bool: which pixels of the padded image are pixels of the image."""
    rows, columns = canvas_of(height, width, patch)
    inside_HW = torch.zeros(1, 1, rows * patch, columns * patch, dtype=torch.bool, device=device)
    inside_HW[..., :height, :width] = True
    return patchify(inside_HW, patch)


def take_rows(rows_BNE: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image by index: [B, K, E]."""
    return torch.gather(rows_BNE, 1, index_BK[..., None].expand(-1, -1, rows_BNE.shape[-1]))


def cell_positions(index_BN: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """int32 (x, y) cells [B, N, 2] of canvas indices."""
    return torch.stack([index_BN % canvas_hw[1], index_BN // canvas_hw[1]], -1).int()
