"""Widths and depths of the network, by name (method section 3), and what a configuration overrides of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from affmae_engine.config import ModelConfig

Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class Size:
    """One network size. Each field is also a field of `ModelConfig`, which overrides it."""

    dims: Four
    """Width of each encoder stage."""
    depths: Four
    """Blocks of each encoder stage."""
    heads: Four
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


def size_of(model: ModelConfig) -> Size:
    """The size that `model.size` names, with the fields that the configuration sets itself."""
    named = SIZES[model.size]
    chosen = {field.name: getattr(model, field.name) for field in fields(Size)}
    return Size(**{name: getattr(named, name) if value is None else value for name, value in chosen.items()})
