"""The one place that knows the model families: networks and encoder layers from a `[model]` section.

A family gives an autoencoder (`forward` returns named losses, `reconstruct` pictures) and a segmenter (`forward`
returns logits), whose encoders and decoders have equal parameter names, so that weights go from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.model.encoder import encoder_depth
from affmae_engine.model.sizes import size_of
from affmae_engine.model.vit_mae import VIT_SIZES, VitMae, vit_encoder_depth
from affmae_engine.model.vit_segmenter import VitSegmenter

Autoencoder = MaskedAutoencoder | VitMae


@dataclass(frozen=True)
class EncoderLayers:
    """What layer-wise learning-rate decay counts.

    depth_of: depth of a parameter by its name, 0 at the image, None outside the encoder. count: number of depths.
    """

    depth_of: Callable[[str], int | None]
    count: int


def build_autoencoder(model: ModelConfig, loss: LossConfig, *, backend: str = "auto") -> Autoencoder:
    """The network that is pretrained, with random weights from torch's global generator.

    Args:
        model: what to build.
        loss: weights of supervised decoder steps; a ViT has one step, whose weight is 1.
        backend: of AFFMAE's operations (`kernels.backend`); a ViT has none.
    """
    if model.family == "vit-mae":
        return VitMae(model)
    return MaskedAutoencoder(model, loss, backend=backend)


def build_segmenter(model: ModelConfig, classes: int, *, backend: str = "auto") -> Segmenter | VitSegmenter:
    """The network that is finetuned and predicts, with random weights from torch's global generator."""
    if model.family == "vit-mae":
        return VitSegmenter(model, classes)
    return Segmenter(model, classes, backend=backend)


def encoder_layers(model: ModelConfig) -> EncoderLayers:
    """The layers of the encoder of either network."""
    if model.family == "vit-mae":
        depth = VIT_SIZES[model.size].depth
        return EncoderLayers(lambda name: vit_encoder_depth(name, depth), 1 + depth)
    size = size_of(model)
    return EncoderLayers(lambda name: encoder_depth(name, size), 1 + sum(size.depths))


def runs_kernels(model: ModelConfig) -> bool:
    """Whether the network computes with the operations of `affmae_kernels`."""
    return model.family == "affmae"
