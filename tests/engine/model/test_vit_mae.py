"""The ViT-MAE baseline: size, contract, what its loss depends on."""

import pytest
import torch

from affmae_engine.config import MaskConfig, ModelConfig
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.vit_mae import VitMae, sincos_positions

TINY = ModelConfig(family="vit-mae", size="tiny")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two float64 images of 64 x 48 pixels, canvas 8 x 6, with their masks."""
    drawn = [draw_mask((8, 6), MaskConfig(), seed=1, index=i) for i in range(2)]
    image = torch.randn(2, 1, 64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {
        "image_BCHW": image,
        "visible_BV": torch.stack([visible for visible, _ in drawn]),
        "masked_BQ": torch.stack([masked for _, masked in drawn]),
    }


@pytest.fixture
def model() -> VitMae:
    torch.manual_seed(0)
    return VitMae(TINY).double()


def cell_pixels(index: int) -> tuple[slice, slice]:
    """Rows and columns of a patch on the 8 x 6 canvas."""
    row, column = divmod(index, 6)
    return slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 1.0), ("small", 21.5), ("base", 64.1)])
def test_parameter_counts(size: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in VitMae(ModelConfig(family="vit-mae", size=size)).parameters())
    assert round(count / 1e6, 1) == millions


def test_loss_is_a_finite_scalar_with_gradients_everywhere(model, batch) -> None:
    loss = model(**batch)["loss"]
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_loss_compares_every_masked_pixel_and_sees_no_masked_input(model, batch) -> None:
    """The prediction does not depend on masked pixels, so the loss is quadratic in them with curvature 2 / count."""
    image, masked = batch["image_BCHW"], batch["masked_BQ"]
    rows, columns = cell_pixels(int(masked[1, 3]))
    losses = []
    for shift in (-1.0, 0.0, 1.0):
        moved = image.clone()
        moved[1, 0, rows, columns] += shift
        losses.append(model(**{**batch, "image_BCHW": moved})["loss"])
    curvature = losses[0] - 2 * losses[1] + losses[2]
    torch.testing.assert_close(curvature, curvature.new_tensor(2 / masked.numel()))


def test_target_is_masked_patches_only(model, batch) -> None:
    """With a constant prediction the visible pixels leave no trace in the loss."""
    torch.nn.init.zeros_(model.heads["last"].linear.weight)
    before = model(**batch)["loss"]
    moved = batch["image_BCHW"].clone()
    rows, columns = cell_pixels(int(batch["visible_BV"][0, 0]))
    moved[0, 0, rows, columns] += 5
    torch.testing.assert_close(model(**{**batch, "image_BCHW": moved})["loss"], before, rtol=0, atol=0)


def test_visible_pixels_are_used(model, batch) -> None:
    moved = batch["image_BCHW"].clone()
    rows, columns = cell_pixels(int(batch["visible_BV"][0, 0]))
    moved[0, 0, rows, columns] += 5
    assert model(**{**batch, "image_BCHW": moved})["loss"] != model(**batch)["loss"]


def test_order_of_the_tokens_does_not_matter(model, batch) -> None:
    shuffled = {
        **batch,
        "visible_BV": batch["visible_BV"].flip(1),
        "masked_BQ": batch["masked_BQ"].roll(3, 1),
    }
    torch.testing.assert_close(model(**shuffled)["loss"], model(**batch)["loss"])


def test_positions_are_all_different() -> None:
    position_TC = sincos_positions((8, 6), 16, torch.device("cpu"))
    assert position_TC.shape == (48, 16) and len(position_TC.unique(dim=0)) == 48


@pytest.mark.parametrize("fp32_residual", [False, True])
def test_autocast_gives_an_fp32_loss(batch, fp32_residual: bool) -> None:
    torch.manual_seed(0)
    model = VitMae(TINY, fp32_residual=fp32_residual)
    single = {**batch, "image_BCHW": batch["image_BCHW"].float()}
    exact = model(**single)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**single)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_it_compiles_as_one_graph(model, batch) -> None:
    expected = model(**batch)["loss"]
    model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(**batch)["loss"], expected)


def test_wrong_shapes_are_refused(model, batch) -> None:
    with pytest.raises(ValueError, match="must divide"):
        model(batch["image_BCHW"][..., :-1], batch["visible_BV"], batch["masked_BQ"])
    with pytest.raises(ValueError, match="do not make up"):
        model(batch["image_BCHW"], batch["visible_BV"][:, 1:], batch["masked_BQ"])
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        model(batch["image_BCHW"].expand(-1, 3, -1, -1), batch["visible_BV"], batch["masked_BQ"])
