"""ViT-MAE, the plain masked autoencoder (He et al., CVPR 2022): the baseline of equal parameters for the benchmark.

Global attention on every pair of tokens. The encoder sees the visible patches and a class token, the decoder all of
them. Two shortcuts that leave the result as it is: only visible patches are embedded, and since attention does not ask
in which order tokens come, the decoder's are [class, visible, masked] and never put back into canvas order. Under
autocast the residual stream has autocast's dtype, as that of AFFMAE; `fp32_residual` keeps it in fp32.

Axes: B batch, C width, H W image, V visible and Q masked tokens, T all tokens of the canvas, N tokens of a sequence,
A heads, D head width, P = p * p * channels values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affmae_engine.model.patches import canvas_of, patchify, take_rows

MLP_RATIO = 4
TOKEN_STD = 0.02


@dataclass(frozen=True)
class VitSize:
    """One size of the baseline."""

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
    """Fixed position code of every canvas cell, [T, dim] fp32: sines and cosines of y, then of x.

    Raises:
        ValueError: when 4 does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"the width of a sin-cos position code must be a multiple of 4; got {dim}")
    frequency_F = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    height, width = canvas_hw
    cell_T = torch.arange(height * width, device=device)
    angles = [cells_T[:, None] * frequency_F for cells_T in (cell_T // width, cell_T % width)]
    return torch.cat([part for angle_TF in angles for part in (angle_TF.sin(), angle_TF.cos())], -1)


class VitBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        qkv_BN3AD = self.qkv(self.norm1(x_BNC)).unflatten(-1, (3, self.heads, -1))
        q_BAND, k_BAND, v_BAND = qkv_BN3AD.permute(2, 0, 3, 1, 4).unbind(0)
        out_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND)
        x_BNC = x_BNC + self.output(out_BAND.transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.norm2(x_BNC))


class VitMae(nn.Module):
    """Encoder on visible patches, decoder on all, pixels of the masked ones. Sides of images are whole patches."""

    def __init__(self, size: str, *, patch: int = 8, channels: int = 1, fp32_residual: bool = False) -> None:
        super().__init__()
        if size not in VIT_SIZES:
            raise ValueError(f"size must be one of {', '.join(VIT_SIZES)}; got {size!r}")
        shape = VIT_SIZES[size]
        values = patch * patch * channels
        self.patch, self.channels, self.fp32_residual = patch, channels, fp32_residual
        self.dim, self.decoder_dim = shape.dim, shape.decoder_dim
        self.embed = nn.Linear(values, shape.dim)
        self.class_token = nn.Parameter(torch.empty(shape.dim))
        self.blocks = nn.ModuleList(VitBlock(shape.dim, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.dim)
        self.decoder_embed = nn.Linear(shape.dim, shape.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(shape.decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            VitBlock(shape.decoder_dim, shape.decoder_heads) for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(shape.decoder_dim)
        self.pixels = nn.Linear(shape.decoder_dim, values)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_token, std=TOKEN_STD)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_BCHW: normalised images, floating; the patch edge divides both sides.
            visible_BV, masked_BQ: int64 canvas indices, see `masking.draw_mask`.

        Returns:
            "loss": mean squared error of the masked patches' pixels, a scalar, at least fp32.

        Raises:
            ValueError: when channels, sides, or visible plus masked tokens, do not fit the image.
        """
        canvas_hw = self._canvas(image_BCHW, visible_BV, masked_BQ)
        patch_BTP = patchify(image_BCHW, self.patch)
        encoded_BNC = self._encode(take_rows(patch_BTP, visible_BV), visible_BV, canvas_hw)
        value_BQP = self._decode(encoded_BNC, visible_BV, masked_BQ, canvas_hw)
        value_BQP = value_BQP.to(torch.promote_types(value_BQP.dtype, torch.float32))
        target_BQP = take_rows(patch_BTP, masked_BQ).to(value_BQP.dtype)
        return {"loss": (value_BQP - target_BQP).square().mean()}

    def _encode(self, patch_BVP: Tensor, visible_BV: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
        """[B, 1 + V, C]: the class token, then the visible patches."""
        x_BVC = self._residual(self.embed(patch_BVP))
        position_TC = sincos_positions(canvas_hw, self.dim, x_BVC.device)
        x_BVC = x_BVC + position_TC[visible_BV].to(x_BVC.dtype)
        class_B1C = self.class_token.to(x_BVC.dtype).expand(len(x_BVC), 1, -1)
        x_BNC = torch.cat([class_B1C, x_BVC], 1)
        for block in self.blocks:
            x_BNC = block(x_BNC)
        encoded_BNC: Tensor = self.norm(x_BNC)
        return encoded_BNC

    def _decode(self, encoded_BNC: Tensor, visible_BV: Tensor, masked_BQ: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
        """Pixels [B, Q, P] of the masked patches."""
        x_BNC = self._residual(self.decoder_embed(encoded_BNC))
        position_TC = sincos_positions(canvas_hw, self.decoder_dim, x_BNC.device).to(x_BNC.dtype)
        seen_BVC = x_BNC[:, 1:] + position_TC[visible_BV]
        hidden_BQC = self.mask_token.to(x_BNC.dtype) + position_TC[masked_BQ]
        x_BNC = torch.cat([x_BNC[:, :1], seen_BVC, hidden_BQC], 1)
        for block in self.decoder_blocks:
            x_BNC = block(x_BNC)
        value_BQP: Tensor = self.pixels(self.decoder_norm(x_BNC[:, -masked_BQ.shape[1] :]))
        return value_BQP

    def _residual(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.float() if self.fp32_residual else x_BNC

    def _canvas(self, image_BCHW: Tensor, visible_BV: Tensor, masked_BQ: Tensor) -> tuple[int, int]:
        if image_BCHW.ndim != 4 or image_BCHW.shape[1] != self.channels:
            raise ValueError(f"image must be [B, {self.channels}, H, W]; got {list(image_BCHW.shape)}")
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
