"""Compiled regions: one graph each, without breaks, and the same function."""

import torch

from affmae_engine.config import LossConfig, MaskConfig, ModelConfig
from affmae_engine.model.autoencoder import MaskedAutoencoder
from affmae_engine.model.masking import draw_mask
from affmae_engine.train.compile import compile_regions


def losses_and_gradients(model, seed=0):
    torch.manual_seed(seed)
    image = torch.randn(2, 1, 64, 96)
    masks = [draw_mask((8, 12), MaskConfig(), seed=0, index=i) for i in range(2)]
    visible, masked = (torch.stack(part) for part in zip(*masks, strict=True))
    loss = model(image, visible, masked)["loss"]
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_regions_compile_without_breaks_to_the_same_function() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    config = ModelConfig(size="tiny", drop_path=0.0, decoder_dropout=0.0)
    model = MaskedAutoencoder(config, LossConfig())
    names = list(model.state_dict())
    expected, expected_gradients = losses_and_gradients(model)
    # Forward traces, autograd traces and functionalisation as for a card; the code generator itself is left out.
    assert compile_regions(model, backend="aot_eager") == 1 + 5 + 3 + 1 + 4 + 3 + 4
    found, gradients = losses_and_gradients(model)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    assert list(model.state_dict()) == names
