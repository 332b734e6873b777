"""Widths and depths of the network, by name (method section 3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One network size. The encoder's head width is 32, the decoder's 64."""

    dims: tuple[int, int, int, int]
    """Width of each encoder stage."""
    depths: tuple[int, int, int, int]
    """Blocks of each encoder stage."""
    heads: tuple[int, int, int, int]
    """Attention heads of each encoder stage."""
    mlp_ratio: float
    """Hidden width of the encoder's MLPs as a multiple of the stage's width."""
    decoder_dim: int
    """Width of the decoder."""
    decoder_heads: int
    """Attention heads of the decoder."""


SIZES: dict[str, Size] = {
    "tiny": Size((32, 64, 96, 96), (1, 1, 2, 1), (1, 2, 3, 3), 2, 128, 2),
    "small": Size((96, 192, 384, 512), (2, 3, 9, 2), (3, 6, 12, 16), 2, 384, 6),
    "base": Size((128, 256, 512, 768), (3, 4, 16, 2), (4, 8, 16, 24), 3, 384, 6),
}
"""`small` has 22.6 M parameters and `base` 65.0 M with the decoder for one channel, `tiny` 0.97 M."""
