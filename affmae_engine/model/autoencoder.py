"""The masked autoencoder: hide patches, encode the visible ones, predict the pixels of the hidden ones (method 5).

Unusual: the loss is taken after three of the four decoder steps (deep supervision), on masked patches alone, against
the pixels of the normalised image.

Axes: B batch, C channels, H W image, V visible and Q masked tokens, P = p * p * C values of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.decoder import Decoder
from affmae_engine.model.encoder import Encoder, StageOutput
from affmae_engine.model.heads import STEP_OF_HEAD, make_heads
from affmae_engine.model.patches import canvas_of, cell_positions, pad_to_patches, patchify, real_pixels, take_rows
from affmae_engine.model.reconstruction import Reconstruction, fill_in

__all__ = ["MaskedAutoencoder", "Reconstruction", "canvas_of"]


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and pixel heads. Images of any size; sides are padded to whole patches inside."""

    def __init__(self, model: ModelConfig, loss: LossConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.patch, self.channels = model.patch_size, model.channels
        self.loss_weights = {"last": 1.0, "step2": loss.step2, "step1": loss.step1}
        self.encoder = Encoder(model, backend=backend)
        self.decoder = Decoder(model, backend=backend)
        self.heads = make_heads(self.decoder.dim, model.patch_size**2 * model.channels)

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            image_BCHW: normalised images, floating.
            visible_BV, masked_BQ: int64 canvas indices, see `masking.draw_mask`.

        Returns:
            "loss" (the weighted sum), then the mean squared errors "last", "step2", "step1"; scalars, at least fp32.

        Raises:
            ValueError: when channels, or visible plus masked tokens, do not fit the image.
        """
        self._check(image_BCHW, visible_BV, masked_BQ)
        predicted, _ = self._predict(image_BCHW, visible_BV, masked_BQ)
        target_BQP = take_rows(patchify(pad_to_patches(image_BCHW, self.patch), self.patch), masked_BQ)
        share_BQP = self._pixel_shares(image_BCHW, masked_BQ)
        losses: dict[str, Tensor] = {}
        for name, value_BQP in predicted.items():
            error_BQP = (value_BQP - target_BQP.to(value_BQP.dtype)).square()
            losses[name] = error_BQP.mean() if share_BQP is None else (error_BQP * share_BQP).sum()
        total = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **losses}

    @torch.no_grad()
    def reconstruct(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> Reconstruction:
        """What the model makes of the masked patches; arguments and errors as in `forward`."""
        self._check(image_BCHW, visible_BV, masked_BQ)
        predicted, stages = self._predict(image_BCHW, visible_BV, masked_BQ)
        images = {
            name: fill_in(image_BCHW, visible_BV, masked_BQ, value_BQP, self.patch)
            for name, value_BQP in predicted.items()
        }
        return Reconstruction(images, [s.pos_BN2 for s in stages], [s.feat_BNC for s in stages])

    def _predict(
        self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor
    ) -> tuple[dict[str, Tensor], list[StageOutput]]:
        """Pixels [B, Q, P] of the masked patches by head, and the encoder's stages."""
        canvas_hw = canvas_of(image_BCHW.shape[-2], image_BCHW.shape[-1], self.patch)
        stages: list[StageOutput] = self.encoder(pad_to_patches(image_BCHW, self.patch), visible_BV)
        steps = self.decoder(stages, cell_positions(masked_BQ, canvas_hw), canvas_hw)
        return {name: self.heads[name](steps[step]) for name, step in STEP_OF_HEAD.items()}, stages

    def _pixel_shares(self, image_BCHW: Tensor, masked_BQ: Tensor) -> Tensor | None:
        """Weights [B, Q, P] that make a mean over the masked pixels of the image; None when nothing is padded."""
        height, width = image_BCHW.shape[-2:]
        if height % self.patch == 0 and width % self.patch == 0:
            return None
        real_1TP = real_pixels(height, width, self.patch, image_BCHW.device).repeat_interleave(self.channels, -1)
        real_BQP = take_rows(real_1TP.expand(image_BCHW.shape[0], -1, -1), masked_BQ).float()
        return real_BQP / real_BQP.sum()

    def _check(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> None:
        if image_BCHW.ndim != 4 or image_BCHW.shape[1] != self.channels:
            raise ValueError(f"image must be [B, {self.channels}, H, W]; got {list(image_BCHW.shape)}")
        height, width = canvas_of(image_BCHW.shape[-2], image_BCHW.shape[-1], self.patch)
        visible, masked = visible_BV.shape[-1], masked_BQ.shape[-1]
        if visible + masked != height * width or not len(visible_BV) == len(masked_BQ) == len(image_BCHW):
            raise ValueError(
                f"{list(visible_BV.shape)} visible and {list(masked_BQ.shape)} masked tokens do not make up the "
                f"{height} x {width} canvas of images {list(image_BCHW.shape)}"
            )
