"""Our ViT-MAE computes what transformers' does: the same weights, image and mask give the same loss and gradients.

What differs by convention is mapped in `in_our_names`: query, key and value are three layers there and one here; the
patch embedding is a convolution there, with (channel, row, column) inputs, and a linear layer on (row, column,
channel) here; tokens have leading axes there. Positions are fixed on both sides, but frozen parameters there, which
published weights carry and a fresh model leaves at zero: it is given our code, whose formula has a test of its own.
"""

import math

import pytest
import torch
from torch import Tensor

from affmae_engine.config import ModelConfig
from affmae_engine.model.vit_mae import VIT_SIZES, VitMae, sincos_positions

transformers = pytest.importorskip("transformers", reason="the comparison needs the dev extra")
EDGE, PATCH, CHANNELS, KEEP = 48, 8, 2, 18
SIZE = VIT_SIZES["tiny"]


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=SIZE.dim, num_hidden_layers=SIZE.depth, num_attention_heads=SIZE.heads,
        intermediate_size=4 * SIZE.dim, decoder_hidden_size=SIZE.decoder_dim,
        decoder_num_hidden_layers=SIZE.decoder_depth, decoder_num_attention_heads=SIZE.decoder_heads,
        decoder_intermediate_size=4 * SIZE.decoder_dim, hidden_act="gelu", layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, image_size=EDGE, patch_size=PATCH,
        num_channels=CHANNELS, mask_ratio=0.5, norm_pix_loss=False,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    canvas_hw = (EDGE // PATCH, EDGE // PATCH)
    codes = {model.vit.embeddings.position_embeddings: SIZE.dim, model.decoder.decoder_pos_embed: SIZE.decoder_dim}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # biases and norms start at 0 and 1, where a mix-up would not show
                parameter.add_(0.05 * torch.randn_like(parameter))
        for parameter, dim in codes.items():
            parameter.zero_()  # the class token has no position
            parameter[0, 1:] = sincos_positions(canvas_hw, dim, torch.device("cpu"))
    return model


def in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, or their gradients, of transformers' model under the names and shapes of ours."""
    ours = {
        "encoder.embed.weight": tensors["vit.embeddings.patch_embeddings.projection.weight"]
        .permute(0, 2, 3, 1)
        .flatten(1),
        "encoder.embed.bias": tensors["vit.embeddings.patch_embeddings.projection.bias"],
        "encoder.class_token": tensors["vit.embeddings.cls_token"].flatten(),
        "decoder.mask_token": tensors["decoder.mask_token"].flatten(),
    }
    layers = {
        "encoder.norm": "vit.layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "heads.last.norm": "decoder.decoder_norm",
        "heads.last.linear": "decoder.decoder_pred",
    }
    stacks = {"encoder": ("vit.layers", SIZE.depth), "decoder": ("decoder.decoder_layers", SIZE.decoder_depth)}
    for part, (stack, depth) in stacks.items():
        for i in range(depth):
            here, there = f"{part}.blocks.{i}", f"{stack}.{i}"
            layers |= {
                f"{here}.norm1": f"{there}.layernorm_before",
                f"{here}.output": f"{there}.attention.o_proj",
                f"{here}.norm2": f"{there}.layernorm_after",
                f"{here}.mlp.0": f"{there}.mlp.fc1",
                f"{here}.mlp.2": f"{there}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                names = [f"{there}.attention.{which}_proj.{kind}" for which in "qkv"]
                ours[f"{here}.qkv.{kind}"] = torch.cat([tensors[name] for name in names])
    for here, there in layers.items():
        ours |= {f"{here}.{kind}": tensors[f"{there}.{kind}"] for kind in ("weight", "bias")}
    return ours


def test_loss_and_every_gradient_agree(theirs: torch.nn.Module) -> None:
    torch.manual_seed(1)
    image = torch.randn(3, CHANNELS, EDGE, EDGE)
    noise = torch.rand(3, (EDGE // PATCH) ** 2)
    expected = theirs(pixel_values=image, noise=noise).loss
    expected.backward()

    model = VitMae(ModelConfig(family="vit-mae", size="tiny", patch_size=PATCH, channels=CHANNELS))
    model.load_state_dict(in_our_names(dict(theirs.named_parameters())))
    order = noise.argsort(1)
    losses = model(image, order[:, :KEEP], order[:, KEEP:])
    losses["loss"].backward()

    torch.testing.assert_close(losses["loss"], expected, rtol=1e-6, atol=0)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = in_our_names(gradients)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=2e-5 * scale, msg=name)


def test_positions_are_those_of_the_published_weights() -> None:
    """Sines and cosines of x, then of y, with frequencies 10000^(-i / (dim / 4))."""
    code_HWC = sincos_positions((5, 7), 16, torch.device("cpu")).unflatten(0, (5, 7))
    wanted = [
        function(place * 10000 ** (-i / 4)) for place in (6, 3) for function in (math.sin, math.cos) for i in range(4)
    ]
    torch.testing.assert_close(code_HWC[3, 6], torch.tensor(wanted), rtol=0, atol=1e-6)
