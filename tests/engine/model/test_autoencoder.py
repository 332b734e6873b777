"""Losses, reconstruction, precision and learning of the masked autoencoder."""

from itertools import pairwise

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.model.sizes import SIZES

PUBLISHED = {"small": 22.9e6, "base": 65.6e6}


def count(size: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedAutoencoder(ModelConfig(size=size), LossConfig()).parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_specification_to_the_last_one(size) -> None:
    """Counted by hand from the formulas of the method; every projection has a bias."""
    dims, depths, heads, ratio, width, decoder_heads = vars(SIZES[size]).values()
    total = (9 + 1) * dims[0] // 2 + (9 * dims[0] // 2 + 1) * dims[0] // 2 + (9 * dims[0] // 2 + 1) * dims[0]
    total += 2 * (dims[0] // 2 + dims[0] // 2 + dims[0])  # norms of the stem
    for c, depth, a in zip(dims, depths, heads, strict=True):
        attention = 3 * c * c + 3 * c + c * c + c + 2 * c + 6 * a
        mlp = 2 * ratio * c * c + ratio * c + c
        total += depth * (attention + mlp + 4 * c) + 2 * c
    for c, after in pairwise(dims):
        total += c + 1 + 4 * 5 + 4 + 8 + 8 * c + 4 * c * after + after
    attention = 2 * (width * width + width) + (width + 1) * decoder_heads * 12 + 1
    step = 2 * attention + 4 * width * width + 3 * width + 6 * width
    total += 4 * step + sum(c * width + 3 * width for c in dims) + width
    total += 3 * (2 * width + 64 * width + 64)
    assert count(size) == total


@pytest.mark.parametrize(("size", "tolerance"), [("small", 0.012), ("base", 0.01)])
def test_parameters_are_those_published(size, tolerance) -> None:
    """small is 1.15 % below the published 22.9 M: what is specified adds up to 22.64 M (see the test above)."""
    assert count(size) == pytest.approx(PUBLISHED[size], rel=tolerance)


def test_tiny_is_under_a_million() -> None:
    assert count("tiny") < 1_000_000


def test_fields_override_the_named_size(batch) -> None:
    config = ModelConfig(
        size="tiny", dims=(16, 48, 64, 96), depths=(1, 2, 1, 1), heads=(1, 3, 2, 3), mlp_ratio=3, decoder_dim=64,
        decoder_heads=4,
    )  # fmt: skip
    model = MaskedAutoencoder(config, LossConfig())
    assert [len(stage.blocks) for stage in model.encoder.stages] == [1, 2, 1, 1]
    assert [stage.norm.weight.numel() for stage in model.encoder.stages] == [16, 48, 64, 96]
    assert model.encoder.stages[1].blocks[0].mlp[0].weight.shape == (144, 48) and model.decoder.dim == 64
    assert torch.isfinite(model(*batch(1, 64, 64))["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": (3, 3, 3, 3)}, "3 heads do not divide the width of 32 of stage 1"),
        ({"decoder_heads": 5}, "a multiple of decoder_heads"),
        ({"dims": (15, 64, 96, 96), "heads": (1, 2, 3, 3)}, "stage 1 must be even"),
        ({"family": "vit-mae", "depths": (1, 1, 1, 1)}, "depths configure AFFMAE only"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"size": "tiny", **settings})


def test_loss_is_the_mean_squared_error_on_masked_patches(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, masked = batch(2, 64, 48)
    losses = model(image, visible, masked)
    assert list(losses) == ["loss", "last", "step2", "step1"]
    result = model.reconstruct(image, visible, masked)
    for name in ("last", "step2", "step1"):
        errors = []
        for b in range(2):
            for cell in masked[b].tolist():
                rows, columns = slice(cell // 6 * 8, cell // 6 * 8 + 8), slice(cell % 6 * 8, cell % 6 * 8 + 8)
                errors.append((result.images[name][b, 0, rows, columns] - image[b, 0, rows, columns]).square())
        torch.testing.assert_close(losses[name], torch.stack(errors).mean())
    expected = losses["last"] + 0.12 * losses["step2"] + 0.05 * losses["step1"]
    torch.testing.assert_close(losses["loss"], expected)
    assert losses["loss"].shape == () and losses["loss"].dtype == torch.float32


def test_reconstruction_keeps_visible_patches_and_describes_the_stages(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, masked = batch(2, 64, 48)
    result = model.reconstruct(image, visible, masked)
    for b in range(2):
        for cell in visible[b].tolist():
            rows, columns = slice(cell // 6 * 8, cell // 6 * 8 + 8), slice(cell % 6 * 8, cell % 6 * 8 + 8)
            assert torch.equal(result.images["last"][b, 0, rows, columns], image[b, 0, rows, columns])
    assert [p.shape[1] for p in result.stage_pos] == [f.shape[1] for f in result.stage_feat] == [24, 9, 3, 1]
    assert not result.images["last"].requires_grad


@pytest.mark.parametrize(
    ("images", "height", "width", "settings"),
    [
        pytest.param(1, 64, 64, {}, id="batch-1"),
        pytest.param(2, 40, 104, {"channels": 2}, id="wide-2-channels"),
        pytest.param(2, 100, 61, {}, id="padded"),
        pytest.param(1, 16, 16, {}, id="one-short-cluster"),
        pytest.param(2, 8, 16, {}, id="one-visible-token"),
        pytest.param(2, 64, 64, {"merging": "l2norm"}, id="l2norm"),
        pytest.param(1, 32, 32, {"patch_size": 4, "cluster_size": 4, "neighbours": 16}, id="patch-4-clusters-of-4"),
        pytest.param(1, 32, 32, {"patch_size": 2, "merge_keep": 1.0}, id="patch-2-keep-all"),
    ],
)
def test_shapes_and_gradients(autoencoder, batch, images, height, width, settings) -> None:
    model = autoencoder(**settings).train()
    channels, patch = settings.get("channels", 1), settings.get("patch_size", 8)
    image, visible, masked = batch(images, height, width, channels=channels, patch=patch)
    model(image, visible, masked)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert model.reconstruct(image, visible, masked).images["last"].shape == image.shape


def test_every_parameter_is_used(autoencoder, batch) -> None:
    model = autoencoder(drop_path=0.0, decoder_dropout=0.0).train()
    image, visible, masked = batch(2, 128, 128)
    model(image, visible, masked)["loss"].backward()
    silent = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert silent == []


def test_padded_pixels_are_not_in_the_loss(autoencoder, batch) -> None:
    model = autoencoder(channels=2)
    image, visible, masked = batch(2, 20, 13, channels=2)
    losses = model(image, visible, masked)
    result = model.reconstruct(image, visible, masked)
    hidden = torch.zeros(2, 6).scatter(1, masked, 1.0).view(2, 1, 3, 2)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :20, :13].expand(-1, 2, -1, -1) > 0
    torch.testing.assert_close(losses["last"], (result.images["last"] - image)[hidden].square().mean())


def test_a_batch_mate_changes_nothing(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, masked = batch(3, 64, 64)
    together = model.reconstruct(image, visible, masked).images["last"]
    alone = model.reconstruct(image[1:2], visible[1:2], masked[1:2]).images["last"]
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_autocast_is_close_to_fp32(autoencoder, batch, dtype, tolerance) -> None:
    model = autoencoder()
    image, visible, masked = batch(2, 64, 64)
    model(image, visible, masked)["loss"].backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = model(image, visible, masked)["loss"].item()
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        losses = model(image, visible, masked)
    assert losses["loss"].dtype == torch.float32
    assert losses["loss"].item() == pytest.approx(loss, rel=tolerance)
    losses["loss"].backward()
    for name in (
        "encoder.stem.convs.0.weight",
        "encoder.stages.2.blocks.0.attention.qkv.weight",
        "heads.last.linear.weight",
    ):
        grad = model.get_parameter(name).grad
        assert torch.isfinite(grad).all()
        assert torch.nn.functional.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.97, name


def test_learns_one_image() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(ModelConfig(size="tiny", drop_path=0.0, decoder_dropout=0.0), LossConfig())
    yy, xx = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = (torch.sin(xx / 5) + torch.sin(yy / 7))[None, None]
    masked = torch.tensor([[i for i in range(64) if (i // 8 + i) % 2]])
    visible = torch.tensor([[i for i in range(64) if not (i // 8 + i) % 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(image, visible, masked)["loss"]
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 3


def test_wrong_input_is_named(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, masked = batch(2, 64, 64)
    with pytest.raises(ValueError, match=r"image must be \[B, 1, H, W\]; got \[2, 2, 64, 64\]"):
        model(image.expand(-1, 2, -1, -1), visible, masked)
    with pytest.raises(ValueError, match=r"\[2, 32\] visible and \[2, 31\] masked.*8 x 8 canvas"):
        model(image, visible, masked[:, 1:])
    with pytest.raises(ValueError, match=r"\[1, 32\] visible"):
        model(image, visible[:1], masked)
