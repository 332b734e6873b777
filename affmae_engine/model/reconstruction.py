"""What a masked autoencoder makes of an image, as pictures and signals need it: the same for every family.

Axes: B batch, C channels, H W image, N tokens of a stage, V visible and Q masked tokens, P = p * p * C values of a
patch, T cells of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from affmae_engine.model.masking import restore_order
from affmae_engine.model.patches import canvas_of, pad_to_patches, patchify, take_rows, unpatchify


@dataclass(frozen=True)
class Reconstruction:
    """Predicted images and the encoder's tokens, for pictures and for the collapse signal."""

    images: dict[str, Tensor]
    """"last" and, where decoder steps are supervised, "step2", "step1": [B, C, H, W], with the input's visible
    patches."""
    stage_pos: list[Tensor]
    """int32 (x, y) cells [B, N, 2] of each stage, finest first; empty for an encoder that merges nothing."""
    stage_feat: list[Tensor]
    """Normed features [B, N, C] of each stage."""


def fill_in(image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor, value_BQP: Tensor, patch: int) -> Tensor:
    """The image [B, C, H, W] with predicted values in place of its masked patches."""
    height, width = image_BCHW.shape[-2:]
    seen_BVP = take_rows(patchify(pad_to_patches(image_BCHW, patch), patch), visible_BV)
    patch_BTP = torch.cat([seen_BVP.to(value_BQP.dtype), value_BQP], 1)
    ordered_BTP = take_rows(patch_BTP, restore_order(visible_BV, masked_BQ))
    return unpatchify(ordered_BTP, canvas_of(height, width, patch), patch)[..., :height, :width]
