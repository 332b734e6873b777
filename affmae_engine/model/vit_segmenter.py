"""Segmentation with a plain ViT: the encoder and decoder of `VitMae` on all tokens, and a class head.

Encoder, decoder and head weigh what those of `VitMae` weigh, as AFFMAE's segmenter does beside its autoencoder; no
pyramid is built on top. Parameter names equal those of `VitMae`, so weights are carried over by name; the mask token
has no counterpart, since nothing is masked. The encoder has stochastic depth (`model.drop_path`) here only.
"""

from __future__ import annotations

from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.affmae import at_least_fp32, check_image
from affmae_engine.model.decoder import Head
from affmae_engine.model.patches import canvas_of, pad_to_patches, patchify, unpatchify
from affmae_engine.model.vit_mae import VIT_SIZES, VitDecoder, VitEncoder, initialise


class VitSegmenter(nn.Module):
    """Encoder, decoder and class head. Images of any size; sides are padded to whole patches inside."""

    def __init__(self, model: ModelConfig, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1; got {classes}")
        shape = VIT_SIZES[model.size]
        self.patch, self.channels = model.patch_size, model.channels
        self.encoder = VitEncoder(shape, model.patch_size**2 * model.channels, drop_path=model.drop_path)
        self.decoder = VitDecoder(shape, masking=False)
        self.heads = nn.ModuleDict({"last": Head(shape.decoder_dim, model.patch_size**2 * classes)})
        initialise(self)

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Class logits of every pixel.

        Args:
            image_BCHW: normalised images, floating.

        Returns:
            "logits", as those of `Segmenter`: [B, K, H, W], in train mode [B, T, P].

        Raises:
            ValueError: when the number of channels is wrong.
        """
        check_image(image_BCHW, self.channels)
        height, width = image_BCHW.shape[-2:]
        canvas_hw = canvas_of(height, width, self.patch)
        patch_BTP = patchify(pad_to_patches(image_BCHW, self.patch), self.patch)
        feat_BTC = self.decoder(self.encoder(patch_BTP, canvas_hw, None), canvas_hw)
        value_BTP = self.heads["last"](feat_BTC)
        if self.training:
            return {"logits": value_BTP}
        return {"logits": unpatchify(at_least_fp32(value_BTP), canvas_hw, self.patch)[..., :height, :width]}
