"""Segmentation: the same encoder on all tokens, a query at every canvas cell, class heads (method section 6).

Parameter names of `encoder.*` and `decoder.*` equal those of `MaskedAutoencoder`, so weights are carried over by name.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.decoder import Decoder
from affmae_engine.model.encoder import Encoder
from affmae_engine.model.heads import STEP_OF_HEAD, class_head_from_pixel_head, make_heads
from affmae_engine.model.patches import canvas_of, cell_positions, pad_to_patches, unpatchify
from affmae_engine.model.sizes import Size

__all__ = ["Segmenter", "class_head_from_pixel_head", "encoder_depth", "encoder_depths"]


class Segmenter(nn.Module):
    """Encoder, decoder and class heads. Images of any size; sides are padded to whole patches inside."""

    def __init__(self, model: ModelConfig, classes: int, *, backend: str = "auto") -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1; got {classes}")
        self.patch, self.channels = model.patch_size, model.channels
        self.encoder = Encoder(model, backend=backend)
        self.decoder = Decoder(model, backend=backend)
        self.heads = make_heads(self.decoder.dim, model.patch_size**2 * classes)

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Class logits of every pixel.

        Args:
            image_BCHW: normalised images, floating.

        Returns:
            "logits" [B, classes, H, W], at least fp32; in train mode also "logits_step2" and "logits_step1".

        Raises:
            ValueError: when the number of channels is wrong.
        """
        if image_BCHW.ndim != 4 or image_BCHW.shape[1] != self.channels:
            raise ValueError(f"image must be [B, {self.channels}, H, W]; got {list(image_BCHW.shape)}")
        batch, _, height, width = image_BCHW.shape
        canvas_hw = canvas_of(height, width, self.patch)
        every_BT = torch.arange(canvas_hw[0] * canvas_hw[1], device=image_BCHW.device).expand(batch, -1)
        stages = self.encoder(pad_to_patches(image_BCHW, self.patch), None)
        steps = self.decoder(stages, cell_positions(every_BT, canvas_hw), canvas_hw)
        logits: dict[str, Tensor] = {}
        for name, step in STEP_OF_HEAD.items():
            if name == "last" or self.training:
                whole_BKHW = unpatchify(self.heads[name](steps[step]), canvas_hw, self.patch)
                logits["logits" if name == "last" else f"logits_{name}"] = whole_BKHW[..., :height, :width]
        return logits


def encoder_depth(parameter_name: str, size: Size) -> int | None:
    """Depth of a parameter for layer-wise learning-rate decay, counted from the image.

    Returns:
        0 for the stem, 1, 2, ... for the blocks over all stages (a stage's norm and merging belong to its last
        block), None for decoder and heads, which have no decay.

    Raises:
        ValueError: for an encoder parameter of an unknown kind.
    """
    if not parameter_name.startswith("encoder."):
        return None
    if parameter_name.startswith("encoder.stem."):
        return 0
    match = re.match(r"encoder\.stages\.(\d+)\.(?:blocks\.(\d+)|norm|merge)\.", parameter_name)
    if match is None:
        raise ValueError(f"unknown encoder parameter {parameter_name!r}")
    stage = int(match[1])
    block = size.depths[stage] - 1 if match[2] is None else int(match[2])
    return 1 + sum(size.depths[:stage]) + block


def encoder_depths(size: Size) -> int:
    """Number of depths that `encoder_depth` tells apart."""
    return 1 + sum(size.depths)
