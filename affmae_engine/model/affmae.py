"""AFFMAE: the masked autoencoder that is pretrained and the segmenter that is finetuned (method sections 5 and 6).

Start reading here; then `encoder`, `decoder` and `masking`. What they call in `affmae_kernels` is written out in plain
PyTorch in the `reference.py` of each operation.

Notable: the loss is taken after three of the four decoder steps (deep supervision), on masked patches alone, against
the pixels of the normalized image. Parameter names of `encoder.*` and `decoder.*` are the same in both models, so
weights are carried over by name.

Axes: B batch, C image channels, K classes, H W image, T all tokens, V visible and Q masked ones, P values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.decoder import HEAD_OF_STEP, HEADS, Decoder, make_heads
from affmae_engine.model.encoder import Encoder, StageOutput
from affmae_engine.model.masking import restore_order
from affmae_engine.model.patches import (
    canvas_of,
    cell_positions,
    pad_to_patches,
    patchify,
    real_pixels,
    take_rows,
    unpatchify,
)
from affmae_kernels.pixel_loss import pixel_loss


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and pixel heads. Images of any size; sides are padded to whole patches inside."""

    def __init__(self, model: ModelConfig, loss: LossConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.patch, self.channels, self.backend = model.patch_size, model.channels, backend
        self.loss_weights = {"last": 1.0, "step2": loss.step2, "step1": loss.step1}
        self.encoder = Encoder(model, backend=backend)
        self.decoder = Decoder(model, backend=backend)
        self.heads = make_heads(self.decoder.dim, model.patch_size**2 * model.channels, backend=backend)

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            image_BCHW: normalized images, floating.
            visible_BV, masked_BQ: int64 canvas indices, see `masking.draw_mask`.

        Returns:
            "loss" (the weighted sum), then the mean squared errors "last", "step2", "step1"; scalars, at least fp32.

        Raises:
            ValueError: when channels, or visible plus masked tokens, do not fit the image.
        """
        self._check(image_BCHW, visible_BV, masked_BQ)
        predicted, _ = self._predict(image_BCHW, visible_BV, masked_BQ)
        # The masked patches of the image are the target; pixels that only pad it do not count.
        target_BQP = take_rows(patchify(pad_to_patches(image_BCHW, self.patch), self.patch), masked_BQ)
        real_BQP = self._real_pixels(image_BCHW, masked_BQ)
        losses = {
            name: pixel_loss(value_BQP, target_BQP, real_BQP, backend=self.backend)
            for name, value_BQP in predicted.items()
        }
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
        stages = self.encoder(pad_to_patches(image_BCHW, self.patch), visible_BV)
        predicted: dict[str, Tensor] = {}
        for step, x_BQC in enumerate(self.decoder(stages, cell_positions(masked_BQ, canvas_hw), canvas_hw)):
            if step in HEAD_OF_STEP:
                predicted[HEAD_OF_STEP[step]] = self.heads[HEAD_OF_STEP[step]](x_BQC)
        return {name: predicted[name] for name in HEADS}, stages

    def _real_pixels(self, image_BCHW: Tensor, masked_BQ: Tensor) -> Tensor | None:
        """Bool [B, Q, P]: the masked pixels that belong to the image; None when nothing is padded."""
        height, width = image_BCHW.shape[-2:]
        if height % self.patch == 0 and width % self.patch == 0:
            return None
        real_1TP = real_pixels(height, width, self.patch, image_BCHW.device).repeat_interleave(self.channels, -1)
        return take_rows(real_1TP.expand(image_BCHW.shape[0], -1, -1), masked_BQ)

    def _check(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> None:
        check_image(image_BCHW, self.channels)
        height, width = canvas_of(image_BCHW.shape[-2], image_BCHW.shape[-1], self.patch)
        visible, masked = visible_BV.shape[-1], masked_BQ.shape[-1]
        if visible + masked != height * width or not len(visible_BV) == len(masked_BQ) == len(image_BCHW):
            raise ValueError(
                f"{list(visible_BV.shape)} visible and {list(masked_BQ.shape)} masked tokens do not make up the "
                f"{height} x {width} canvas of images {list(image_BCHW.shape)}"
            )


class Segmenter(nn.Module):
    """Encoder, decoder and class heads. Images of any size; sides are padded to whole patches inside."""

    def __init__(self, model: ModelConfig, classes: int, *, backend: str = "auto") -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1; got {classes}")
        self.patch, self.channels = model.patch_size, model.channels
        self.encoder = Encoder(model, backend=backend)
        self.decoder = Decoder(model, backend=backend)
        self.heads = make_heads(self.decoder.dim, model.patch_size**2 * classes, backend=backend)

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Class logits of every pixel.

        Args:
            image_BCHW: normalized images, floating.

        Returns:
            In eval mode "logits" [B, K, H, W], at least fp32. In train mode the values of the heads as they are, for
            `segmentation_loss`: "logits", "logits_step2" and "logits_step1", [B, T, P] with P = (row, column, class).

        Raises:
            ValueError: when the number of channels is wrong.
        """
        check_image(image_BCHW, self.channels)
        batch, _, height, width = image_BCHW.shape
        canvas_hw = canvas_of(height, width, self.patch)
        # Nothing is masked: the encoder sees every patch, and a query asks for every patch.
        every_BT = torch.arange(canvas_hw[0] * canvas_hw[1], device=image_BCHW.device).expand(batch, -1)
        stages = self.encoder(pad_to_patches(image_BCHW, self.patch), every_BT)
        values: dict[str, Tensor] = {}
        for step, x_BTC in enumerate(self.decoder(stages, cell_positions(every_BT, canvas_hw), canvas_hw)):
            name = HEAD_OF_STEP.get(step)
            if name == "last" or (name and self.training):
                values[name] = self.heads[name](x_BTC)
        if not self.training:
            whole_BKHW = unpatchify(at_least_fp32(values["last"]), canvas_hw, self.patch)
            return {"logits": whole_BKHW[..., :height, :width]}
        return {"logits": values["last"], "logits_step2": values["step2"], "logits_step1": values["step1"]}


def class_head_from_pixel_head(
    weight: Tensor, bias: Tensor, classes: int, channels: int, patch: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The class head's start: the pixel head (mean over image channels) repeated per class, plus noise of 1e-4.

    Args:
        weight: [p * p * channels, C] of the pixel head.
        bias: [p * p * channels].
        classes: number of classes.
        channels: image channels of the pixel head.
        patch: p.
        generator: of the noise, on the CPU.

    Returns:
        weight [p * p * classes, C] and bias [p * p * classes], rows laid out as (row, column, class).

    Raises:
        ValueError: when the pixel head has another number of rows.
    """
    if weight.shape[0] != patch * patch * channels or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a pixel head for {channels} channels and patches of {patch} has {patch * patch * channels} rows; got "
            f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        )

    def repeated(rows: Tensor) -> Tensor:
        per_pixel = rows.unflatten(0, (patch * patch, channels)).mean(1)
        result = per_pixel.repeat_interleave(classes, 0)
        noise = torch.randn(result.shape, generator=generator, dtype=torch.float32)
        return result + 1e-4 * noise.to(result)

    return repeated(weight), repeated(bias)


@dataclass(frozen=True)
class Reconstruction:
    """Predicted images and the encoder's tokens, of either model family, for previews and the collapse signal."""

    images: dict[str, Tensor]
    """"last" and, where decoder steps are supervised, "step2", "step1": [B, C, H, W], with the input's visible
    patches."""
    stage_pos: list[Tensor]
    """int32 (x, y) cells [B, N, 2] of each stage, finest first; empty for an encoder that merges nothing."""
    stage_feat: list[Tensor]
    """Normalized features [B, N, C] of each stage."""


def fill_in(image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor, value_BQP: Tensor, patch: int) -> Tensor:
    """The image [B, C, H, W], at least fp32, with predicted values in place of its masked patches."""
    height, width = image_BCHW.shape[-2:]
    value_BQP = at_least_fp32(value_BQP)
    seen_BVP = take_rows(patchify(pad_to_patches(image_BCHW, patch), patch), visible_BV)
    patch_BTP = torch.cat([seen_BVP.to(value_BQP.dtype), value_BQP], 1)
    ordered_BTP = take_rows(patch_BTP, restore_order(visible_BV, masked_BQ))
    return unpatchify(ordered_BTP, canvas_of(height, width, patch), patch)[..., :height, :width]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in float64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_image(image_BCHW: Tensor, channels: int) -> None:
    """Raises ValueError unless the images are [B, channels, H, W]."""
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != channels:
        raise ValueError(f"image must be [B, {channels}, H, W]; got {list(image_BCHW.shape)}")
