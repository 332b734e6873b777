"""The plain ViT's segmenter: outputs, names and weight shared with the autoencoder, layers."""

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.build import build_autoencoder, build_segmenter, encoder_layers
from affmae_engine.model.vit_segmenter import VitSegmenter

TINY = ModelConfig(family="vit-mae", size="tiny", channels=2, drop_path=0.2)


@pytest.fixture
def model() -> VitSegmenter:
    torch.manual_seed(0)
    return build_segmenter(TINY, 3)


def test_logits_of_images_of_any_size(model) -> None:
    for height, width in ((64, 64), (50, 37)):
        image = torch.randn(2, 2, height, width)
        logits = model.eval()(image)["logits"]
        assert logits.shape == (2, 3, height, width) and logits.dtype == torch.float32
        # In train mode the patches' values as they are, for the loss.
        tokens = -(-height // 8) * -(-width // 8)
        assert model.train()(image)["logits"].shape == (2, tokens, 8 * 8 * 3)
    with pytest.raises(ValueError, match=r"\[B, 2, H, W\]"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="at least 1"):
        build_segmenter(TINY, 0)


def test_class_logits_land_on_their_pixels(model) -> None:
    model.eval()
    with torch.no_grad():
        model.heads["last"].linear.weight.zero_()
        model.heads["last"].linear.bias.copy_(torch.arange(8 * 8 * 3.0))
        logits = model(torch.randn(1, 2, 16, 24))["logits"]
    for row, column, label in [(0, 0, 0), (3, 5, 2), (7, 7, 1)]:
        assert (logits[0, label, row::8, column::8] == (row * 8 + column) * 3 + label).all()


def test_a_patch_is_told_by_its_position(model) -> None:
    """The same patch everywhere: without positions every patch would get the same logits."""
    logits = (
        model.eval()(torch.randn(1, 2, 8, 8).repeat(1, 1, 3, 3))["logits"].unflatten(2, (3, 8)).unflatten(4, (3, 8))
    )
    assert (logits[:, :, 0, :, 0] - logits[:, :, 1, :, 2]).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient_and_stochastic_depth_acts(model) -> None:
    image = torch.randn(4, 2, 32, 32)
    first, second = model(image)["logits"], model(image)["logits"]
    assert not torch.equal(first, second)
    first.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    model.eval()
    assert torch.equal(model(image)["logits"], model(image)["logits"])


def test_names_equal_those_of_the_autoencoder(model) -> None:
    ours = {name: p.shape for name, p in model.named_parameters()}
    theirs = {name: p.shape for name, p in build_autoencoder(TINY, LossConfig()).named_parameters()}
    assert theirs.keys() - ours.keys() == {"decoder.mask_token"} and not ours.keys() - theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {
        f"heads.last.linear.{k}" for k in ("weight", "bias")
    }


def test_layers_count_blocks_from_the_image(model) -> None:
    layers = encoder_layers(TINY)
    depths = {name: layers.depth_of(name) for name in dict(model.named_parameters())}
    assert layers.count == 5
    assert depths["encoder.embed.weight"] == depths["encoder.class_token"] == 0
    assert (depths["encoder.blocks.0.qkv.bias"], depths["encoder.blocks.3.mlp.2.weight"]) == (1, 4)
    assert depths["encoder.norm.weight"] == 4
    assert {depth is None for name, depth in depths.items() if not name.startswith("encoder.")} == {True}
    with pytest.raises(ValueError, match="unknown encoder parameter"):
        layers.depth_of("encoder.stem.weight")
