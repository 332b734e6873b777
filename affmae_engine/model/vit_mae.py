"""ViT-MAE, the plain masked autoencoder (He et al., CVPR 2022): the model family that AFFMAE is measured against.

Global attention on every pair of tokens. The encoder sees the visible patches and a class token, the decoder all of
them. Two shortcuts that leave the result as it is: only visible patches are embedded, and since attention does not ask
in which order tokens come, the decoder's are [class, visible, masked] and never put back into canvas order. Under
autocast the residual stream has autocast's dtype, as that of AFFMAE; `fp32_residual` keeps it in fp32. Positions are
computed, not learned, so any canvas will do.

Axes: B batch, C width, H W image, V visible and Q masked tokens, T all tokens of the canvas, N tokens of a sequence,
A heads, D head width, P = p * p * channels values of a patch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.affmae import Reconstruction, check_image, fill_in
from affmae_engine.model.decoder import Head
from affmae_engine.model.patches import canvas_of, patchify, take_rows
from affmae_kernels.pixel_loss import pixel_loss

MLP_RATIO = 4
TOKEN_STD = 0.02


@dataclass(frozen=True)
class VitSize:
    """One size of the family."""

    dim: int
    """Width of the encoder."""
    depth: int
    """Blocks of the encoder."""
    heads: int
    """Attention heads of the encoder."""
    decoder_dim: int = 384
    """Width of the decoder."""
    decoder_depth: int = 4
    """Blocks of the decoder."""
    decoder_heads: int = 6
    """Attention heads of the decoder."""


VIT_SIZES: dict[str, VitSize] = {
    "tiny": VitSize(64, 4, 2, 128, 4, 2),
    "small": VitSize(384, 8, 6),
    "base": VitSize(512, 18, 8),
}
"""`small` has 21.5 M parameters and `base` 64.1 M with the decoder for one channel, `tiny` 1.0 M."""


def sincos_positions(canvas_hw: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Fixed position code of every canvas cell, [T, dim] fp32: sines and cosines of x, then of y.

    Raises:
        ValueError: when 4 does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"the width of a sin-cos position code must be a multiple of 4; got {dim}")
    frequency_F = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    height, width = canvas_hw
    cell_T = torch.arange(height * width, device=device)
    angles = [cells_T[:, None] * frequency_F for cells_T in (cell_T % width, cell_T // width)]
    return torch.cat([part for angle_TF in angles for part in (angle_TF.sin(), angle_TF.cos())], -1)


class DropPath(nn.Module):
    """Drops a residual branch for whole images while training and rescales the kept ones.

    The rate is a tensor, so that blocks that differ in it alone share one compiled graph.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, branch_BNC: Tensor) -> Tensor:
        """Returns the branch, or zeros for the dropped images."""
        if not self.training:
            return branch_BNC
        kept_B11 = torch.rand(branch_BNC.shape[0], 1, 1, device=branch_BNC.device) < self.keep
        return branch_BNC * (kept_B11 / self.keep).to(branch_BNC.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rate={self.rate:.3f}"


class VitBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with stochastic depth where a rate is given."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        qkv_BN3AD = self.qkv(self.norm1(x_BNC)).unflatten(-1, (3, self.heads, -1))
        q_BAND, k_BAND, v_BAND = qkv_BN3AD.permute(2, 0, 3, 1, 4).unbind(0)
        out_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND)
        x_BNC = x_BNC + self.drop_path(self.output(out_BAND.transpose(1, 2).flatten(2)))
        return x_BNC + self.drop_path(self.mlp(self.norm2(x_BNC)))


class VitEncoder(nn.Module):
    """Patches to tokens, a class token in front, and blocks on all of them."""

    def __init__(self, shape: VitSize, values: int, *, drop_path: float = 0.0, fp32_residual: bool = False) -> None:
        super().__init__()
        self.dim, self.fp32_residual = shape.dim, fp32_residual
        self.embed = nn.Linear(values, shape.dim)
        self.class_token = nn.Parameter(torch.empty(shape.dim))
        rates = [drop_path * block / max(shape.depth - 1, 1) for block in range(shape.depth)]
        self.blocks = nn.ModuleList(VitBlock(shape.dim, shape.heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(shape.dim)

    def forward(self, patch_BNP: Tensor, canvas_hw: tuple[int, int], visible_BV: Tensor | None) -> Tensor:
        """[B, 1 + N, C]: the class token, then the patches.

        Args:
            patch_BNP: values of the visible patches, or of all.
            canvas_hw: height and width of the canvas, in cells.
            visible_BV: int64 canvas indices of the patches; None: all of them in canvas order.
        """
        x_BNC = _residual(self.embed(patch_BNP), self.fp32_residual)
        position_TC = sincos_positions(canvas_hw, self.dim, x_BNC.device).to(x_BNC.dtype)
        x_BNC = x_BNC + (position_TC if visible_BV is None else position_TC[visible_BV])
        class_B1C = self.class_token.to(x_BNC.dtype).expand(len(x_BNC), 1, -1)
        x_BNC = torch.cat([class_B1C, x_BNC], 1)
        for block in self.blocks:
            x_BNC = block(x_BNC)
        encoded_BNC: Tensor = self.norm(x_BNC)
        return encoded_BNC


class VitDecoder(nn.Module):
    """Blocks on the tokens of the whole canvas; with a mask token when some of them are masked."""

    def __init__(self, shape: VitSize, *, masking: bool, fp32_residual: bool = False) -> None:
        super().__init__()
        self.dim, self.fp32_residual = shape.decoder_dim, fp32_residual
        self.embed = nn.Linear(shape.dim, shape.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(shape.decoder_dim)) if masking else None
        self.blocks = nn.ModuleList(
            VitBlock(shape.decoder_dim, shape.decoder_heads) for _ in range(shape.decoder_depth)
        )

    def forward(
        self,
        encoded_BNC: Tensor,
        canvas_hw: tuple[int, int],
        visible_BV: Tensor | None = None,
        masked_BQ: Tensor | None = None,
    ) -> Tensor:
        """Features of the masked tokens [B, Q, C], or, when nothing is masked, of all tokens [B, T, C].

        Args:
            encoded_BNC: the encoder's class token and patches.
            canvas_hw: height and width of the canvas, in cells.
            visible_BV, masked_BQ: int64 canvas indices; both or neither.
        """
        x_BNC = _residual(self.embed(encoded_BNC), self.fp32_residual)
        position_TC = sincos_positions(canvas_hw, self.dim, x_BNC.device).to(x_BNC.dtype)
        seen_BNC = x_BNC[:, 1:] + (position_TC if visible_BV is None else position_TC[visible_BV])
        parts = [x_BNC[:, :1], seen_BNC]
        if masked_BQ is not None and self.mask_token is not None:
            parts.append(self.mask_token.to(x_BNC.dtype) + position_TC[masked_BQ])
        x_BNC = torch.cat(parts, 1)
        for block in self.blocks:
            x_BNC = block(x_BNC)
        return x_BNC[:, 1 if masked_BQ is None else -masked_BQ.shape[1] :]


class VitMae(nn.Module):
    """Encoder on visible patches, decoder on all, pixels of the masked ones. Sides of images are whole patches."""

    def __init__(self, model: ModelConfig, *, fp32_residual: bool = False) -> None:
        super().__init__()
        shape = VIT_SIZES[model.size]
        values = model.patch_size**2 * model.channels
        self.patch, self.channels = model.patch_size, model.channels
        self.encoder = VitEncoder(shape, values, fp32_residual=fp32_residual)
        self.decoder = VitDecoder(shape, masking=True, fp32_residual=fp32_residual)
        self.heads = nn.ModuleDict({"last": Head(shape.decoder_dim, values)})
        initialise(self)

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_BCHW: normalised images, floating; the patch edge divides both sides.
            visible_BV, masked_BQ: int64 canvas indices, see `masking.draw_mask`.

        Returns:
            "loss": mean squared error of the masked patches' pixels, a scalar, at least fp32; and the same as "last",
            the name that AFFMAE gives to the loss of its last decoder step.

        Raises:
            ValueError: when channels, sides, or visible plus masked tokens, do not fit the image.
        """
        value_BQP, _ = self._predict(image_BCHW, visible_BV, masked_BQ)
        loss = pixel_loss(value_BQP, take_rows(patchify(image_BCHW, self.patch), masked_BQ))
        return {"loss": loss, "last": loss}

    @torch.no_grad()
    def reconstruct(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> Reconstruction:
        """What the model makes of the masked patches; arguments and errors as in `forward`."""
        value_BQP, encoded_BNC = self._predict(image_BCHW, visible_BV, masked_BQ)
        image = fill_in(image_BCHW, visible_BV, masked_BQ, value_BQP, self.patch)
        return Reconstruction({"last": image}, [], [encoded_BNC[:, 1:]])

    def _predict(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, Q, P] of the masked patches, and the encoder's tokens [B, 1 + V, C]."""
        canvas_hw = self._canvas(image_BCHW, visible_BV, masked_BQ)
        patch_BVP = take_rows(patchify(image_BCHW, self.patch), visible_BV)
        encoded_BNC = self.encoder(patch_BVP, canvas_hw, visible_BV)
        return self.heads["last"](self.decoder(encoded_BNC, canvas_hw, visible_BV, masked_BQ)), encoded_BNC

    def _canvas(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> tuple[int, int]:
        check_image(image_BCHW, self.channels)
        height, width = image_BCHW.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"{self.patch} must divide both sides of the image; got {height} x {width}")
        rows, columns = canvas_of(height, width, self.patch)
        if visible_BV.shape[-1] + masked_BQ.shape[-1] != rows * columns:
            raise ValueError(
                f"{visible_BV.shape[-1]} visible and {masked_BQ.shape[-1]} masked tokens do not make up the "
                f"{rows} x {columns} canvas"
            )
        return rows, columns


def initialise(model: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases, small random tokens, as He et al. start theirs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            nn.init.normal_(parameter, std=TOKEN_STD)


def vit_encoder_depth(parameter_name: str, depth: int) -> int | None:
    """Depth of a parameter for layer-wise learning-rate decay, counted from the image.

    Returns:
        0 for patch embedding and class token, 1, 2, ... for the `depth` blocks (the norm belongs to the last one),
        None for decoder and heads, which have no decay.

    Raises:
        ValueError: for an encoder parameter of an unknown kind.
    """
    if not parameter_name.startswith("encoder."):
        return None
    if parameter_name.startswith(("encoder.embed.", "encoder.class_token")):
        return 0
    match = re.match(r"encoder\.(?:blocks\.(\d+)|norm)\.", parameter_name)
    if match is None:
        raise ValueError(f"unknown encoder parameter {parameter_name!r}")
    return depth if match[1] is None else 1 + int(match[1])


def _residual(x_BNC: Tensor, fp32: bool) -> Tensor:
    return x_BNC.float() if fp32 else x_BNC
