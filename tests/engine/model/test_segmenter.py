"""The segmenter: outputs, names shared with the autoencoder, depths of its parameters."""

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.model.encoder import encoder_depth
from affmae_engine.model.sizes import SIZES


@pytest.fixture
def model() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ModelConfig(size="tiny", channels=2), classes=3)


def test_outputs_in_both_modes(model) -> None:
    image = torch.randn(2, 2, 50, 37)
    out = model(image)
    assert list(out) == ["logits", "logits_step2", "logits_step1"]
    assert all(x.shape == (2, 7 * 5, 8 * 8 * 3) for x in out.values())
    out = model.eval()(image)
    assert list(out) == ["logits"] and out["logits"].shape == (2, 3, 50, 37) and out["logits"].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image)["logits"].dtype == torch.float32


def test_class_logits_land_on_their_pixels(model) -> None:
    model.eval()
    with torch.no_grad():
        model.heads["last"].linear.weight.zero_()
        bias = torch.arange(8 * 8 * 3.0)
        model.heads["last"].linear.bias.copy_(bias)
        logits = model(torch.randn(1, 2, 16, 24))["logits"]
    for row, column, label in [(0, 0, 0), (3, 5, 2), (7, 7, 1)]:
        assert (logits[0, label, row::8, column::8] == (row * 8 + column) * 3 + label).all()


def test_every_parameter_gets_a_gradient(model) -> None:
    sum(x.square().mean() for x in model(torch.randn(1, 2, 64, 64)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_names_equal_those_of_the_autoencoder(merging) -> None:
    config = ModelConfig(size="tiny", merging=merging)
    ours = {n: p.shape for n, p in Segmenter(config, classes=2).named_parameters()}
    theirs = {n: p.shape for n, p in MaskedAutoencoder(config, LossConfig()).named_parameters()}
    assert list(ours) == list(theirs)
    assert {n for n in ours if ours[n] != theirs[n]} == {
        f"heads.{head}.linear.{kind}" for head in ("last", "step2", "step1") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_depths_count_blocks_from_the_image(merging) -> None:
    size = SIZES["tiny"]
    names = [n for n, _ in Segmenter(ModelConfig(size="tiny", merging=merging), classes=2).named_parameters()]
    depths = {n: encoder_depth(n, size) for n in names}
    assert {d for d in depths.values() if d is not None} == set(range(6))
    assert all((depth is None) == (not name.startswith("encoder.")) for name, depth in depths.items())
    assert depths["encoder.stem.convs.0.weight"] == 0
    assert depths["encoder.stages.0.blocks.0.norm1.weight"] == 1
    assert depths["encoder.stages.0.merge.reduction.weight"] == depths["encoder.stages.0.norm.bias"] == 1
    assert depths["encoder.stages.2.blocks.0.mlp.0.weight"] == 3
    assert depths["encoder.stages.2.blocks.1.mlp.0.weight"] == depths["encoder.stages.2.norm.weight"] == 4
    assert depths["encoder.stages.3.norm.weight"] == 5
    with pytest.raises(ValueError, match=r"unknown encoder parameter 'encoder\.x'"):
        encoder_depth("encoder.x", size)


def test_wrong_input_is_named(model) -> None:
    with pytest.raises(ValueError, match=r"image must be \[B, 2, H, W\]; got \[1, 1, 8, 8\]"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="classes must be at least 1; got 0"):
        Segmenter(ModelConfig(size="tiny"), classes=0)
