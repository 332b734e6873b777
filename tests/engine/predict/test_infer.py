"""Tiled inference: no seams, every row once, batches across planes, out-of-memory retries."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from affmae_engine.errors import ResourceError
from affmae_engine.predict.infer import ArrayPlane, TileRunner, Tiling, blend, predict_plane

CPU = torch.device("cpu")


def runner(model: torch.nn.Module, classes: int = 3, batch_size: int = 4, **more: object) -> TileRunner:
    return TileRunner(model.eval(), classes=classes, batch_size=batch_size, device=CPU, **more)


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (64, 64), (130, 77)])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8])
def test_constant_model_gives_a_constant(toys: SimpleNamespace, shape: tuple[int, int], overlap: float) -> None:
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    result = predict_plane(toys.constant(), noise, classes=3, tile=32, overlap=overlap, device=CPU)
    expected = torch.tensor((0.3, -1.0, 2.0)).softmax(0)
    assert result.shape == (3, *shape)
    assert torch.allclose(result, expected[:, None, None].expand_as(result), atol=1e-6, rtol=0)
    assert (result.argmax(0) == 2).all()


def test_tiles_agree_with_the_whole_image(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(1).normal(size=(150, 131)).astype(np.float32)
    model = toys.conv().eval()
    with torch.no_grad():
        padded = torch.nn.functional.pad(torch.from_numpy(image)[None, None], (8, 8, 8, 8), mode="reflect")
        whole = model(padded)["logits"].softmax(1)[0, :, 8:-8, 8:-8]
    difference = (predict_plane(model, image, classes=3, tile=64, overlap=0.5, device=CPU) - whole).abs()
    # Only the outermost 3 pixels of a tile differ (zero padding inside the network); their weight is below 1e-3.
    assert difference.max() < 2e-3
    assert difference[:, :8].max() < 2e-3 and difference[:, :, -8:].max() < 2e-3
    assert difference.median() < 1e-6


def test_bands_hold_every_row_once_and_batches_span_planes(toys: SimpleNamespace) -> None:
    rng = np.random.default_rng(2)
    planes = [rng.normal(size=shape).astype(np.float32) for shape in ((40, 50), (7, 9), (90, 33), (1, 1))]
    model = toys.conv()
    sizes: list[int] = []
    seen: dict[int, list[torch.Tensor]] = {}
    for band in blend(map(ArrayPlane, planes), runner(model, batch_size=7), Tiling(32), on_tiles=sizes.append):
        rows = seen.setdefault(band.plane, [])
        assert band.first_row == sum(part.shape[1] for part in rows)
        rows.append(band.probabilities_CRX)
    assert list(seen) == [0, 1, 2, 3]
    assert sum(sizes) == sum(Tiling(32).count(plane.shape) for plane in planes)
    assert set(sizes[:-1]) == {7}
    for index, plane in enumerate(planes):
        alone = predict_plane(model, plane, classes=3, tile=32, batch_size=1, device=CPU)
        assert torch.allclose(torch.cat(seen[index], 1), alone, atol=1e-5)


class Greedy(torch.nn.Module):
    """Runs out of memory for more than `limit` tiles at a time."""

    def __init__(self, inner: torch.nn.Module, limit: int) -> None:
        super().__init__()
        self.inner, self.limit, self.sizes = inner, limit, []

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.sizes.append(len(image))
        if len(image) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(image)


def test_out_of_memory_halves_the_batch_and_goes_on(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(3).normal(size=(70, 70)).astype(np.float32)
    model, told = Greedy(toys.conv(), 3), []
    tiles = runner(model, batch_size=8, on_smaller_batch=told.append)
    bands = list(blend([ArrayPlane(image)], tiles, Tiling(32)))
    result = torch.cat([band.probabilities_CRX for band in bands], 1)
    assert told == [4, 2] and tiles.batch_size == 2
    assert model.sizes[:3] == [8, 4, 2] and max(model.sizes[3:]) == 2
    assert torch.allclose(result, predict_plane(model.inner, image, classes=3, tile=32, device=CPU), atol=1e-5)


def test_a_tile_that_never_fits_is_a_resource_error(toys: SimpleNamespace) -> None:
    with pytest.raises(ResourceError, match="one tile of 32 x 32") as caught:
        list(
            blend([ArrayPlane(np.zeros((8, 8), np.float32))], runner(Greedy(toys.conv(), 0), batch_size=4), Tiling(32))
        )
    assert "--tile" in caught.value.hint


def test_an_excluded_class_is_never_predicted(toys: SimpleNamespace) -> None:
    tiles = runner(toys.constant(), excluded=(2, 255))
    band = next(blend([ArrayPlane(np.zeros((8, 8), np.float32))], tiles, Tiling(16)))
    assert not band.probabilities_CRX[2].any()
    assert (band.probabilities_CRX.argmax(0) == 0).all()


def test_training_mode_is_restored(toys: SimpleNamespace) -> None:
    model = toys.conv().train()
    predict_plane(model, np.zeros((8, 8), np.float32), classes=3, tile=8, device=CPU)
    assert model.training


def test_autocast_still_returns_float32_probabilities(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(4).normal(size=(20, 20)).astype(np.float32)
    result = predict_plane(toys.conv(), image, classes=3, tile=16, device=CPU, autocast=torch.bfloat16)
    assert result.dtype == torch.float32
    assert torch.allclose(result.sum(0), torch.ones(20, 20), atol=1e-5)


def test_reading_ahead_changes_nothing(toys: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator tiles are made in a thread; here a CPU passes for one."""
    planes = [np.random.default_rng(seed).normal(size=(60, 45)).astype(np.float32) for seed in range(3)]
    plain = [band.probabilities_CRX for band in blend(map(ArrayPlane, planes), runner(toys.conv()), Tiling(32))]
    tiles = runner(toys.conv())
    monkeypatch.setattr(tiles, "device", SimpleNamespace(type="other"))
    monkeypatch.setattr(tiles, "_forward", lambda tiles_BTT: runner(toys.conv()).probabilities(tiles_BTT))
    monkeypatch.setattr("affmae_engine.predict.infer.ACCUMULATE_ON_DEVICE_BYTES", 0)
    threaded = [band.probabilities_CRX for band in blend(map(ArrayPlane, planes), tiles, Tiling(32))]
    assert len(plain) == len(threaded) and all(map(torch.equal, plain, threaded))


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_card_agrees_with_the_cpu(toys: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("affmae_engine.predict.infer.ACCUMULATE_ON_DEVICE_BYTES", limit)
    image = np.random.default_rng(6).normal(size=(150, 131)).astype(np.float32)
    expected = predict_plane(toys.conv(), image, classes=3, tile=64, device=CPU)
    card = torch.device("cuda")
    result = predict_plane(toys.conv().to(card), image, classes=3, tile=64, device=card)
    assert result.device.type == "cpu" and torch.allclose(result, expected, atol=1e-3)
    half = predict_plane(toys.conv().to(card), image, classes=3, tile=64, device=card, autocast=torch.bfloat16)
    assert (half - expected).abs().max() < 0.1
