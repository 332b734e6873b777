"""Tiled inference: no seams, windows that fit together, tiles that must not be seen, resampling, CLAHE."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from affmae_engine.data.normalise import IntensityMap
from affmae_engine.predict import compute
from affmae_engine.predict.compute import (
    PlaneGeometry,
    predicted_classes,
    read_window,
    window_probabilities,
)
from affmae_engine.predict.network import TileNetwork

CPU = torch.device("cpu")
AS_IT_IS = IntensityMap(0.0, 1.0)


class Planes:
    """A stack in memory."""

    def __init__(self, volume_ZYX: np.ndarray) -> None:
        self.volume = volume_ZYX

    def read(self, z: slice, y: slice, x: slice) -> np.ndarray:
        return self.volume[z, y, x]


def network(model: torch.nn.Module, classes: int = 3, **more: object) -> TileNetwork:
    return TileNetwork(model.eval(), classes=classes, device=CPU, **more)


def probabilities(
    net: TileNetwork,
    volume: np.ndarray,
    *,
    tile: int = 32,
    overlap: float = 0.5,
    inner: tuple[int, int] | None = None,
    batch: int = 4,
    y: tuple[int, int] | None = None,
    x: tuple[int, int] | None = None,
    intensity: IntensityMap = AS_IT_IS,
) -> torch.Tensor:
    depth, *shape = volume.shape
    geometry = PlaneGeometry.of((shape[0], shape[1]), inner or (shape[0], shape[1]), tile, overlap)
    window = read_window(Planes(volume), geometry, intensity, (0, depth), y or (0, shape[0]), x or (0, shape[1]))
    told: list[int] = []
    values = window_probabilities(net, window, batch, intensity=intensity, on_tiles=told.append)
    assert sum(told) == window.tile_count
    return values


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (64, 64), (130, 77)])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8])
def test_constant_model_gives_a_constant(toys: SimpleNamespace, shape: tuple[int, int], overlap: float) -> None:
    noise = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    result = probabilities(network(toys.constant()), noise, overlap=overlap)
    expected = torch.tensor((0.3, -1.0, 2.0)).softmax(0)[None, :, None, None]
    assert result.shape == (1, 3, *shape)
    assert torch.allclose(result, expected.expand_as(result), atol=1e-6, rtol=0)


def test_tiles_agree_with_the_whole_image(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(1).normal(size=(1, 150, 131)).astype(np.float32)
    model = toys.conv().eval()
    with torch.no_grad():
        padded = torch.nn.functional.pad(torch.from_numpy(image)[None], (8, 8, 8, 8), mode="reflect")
        whole = model(padded)["logits"].softmax(1)[:, :, 8:-8, 8:-8]
    difference = (probabilities(network(model), image, tile=64) - whole).abs()
    # Only the outermost 3 pixels of a tile differ (zero padding inside the network); their weight is below 1e-3.
    assert difference.max() < 2e-3 and difference.median() < 1e-6


@pytest.mark.parametrize("inner", [None, (60, 51), (241, 150)])
def test_windows_have_the_values_of_the_whole(toys: SimpleNamespace, inner: tuple[int, int] | None) -> None:
    volume = np.random.default_rng(2).normal(size=(2, 120, 101)).astype(np.float32)
    net = network(toys.conv())
    whole = probabilities(net, volume, inner=inner)
    assert whole.shape == (2, 3, 120, 101) and torch.allclose(whole.sum(1), torch.ones(2, 120, 101), atol=1e-5)
    for y, x in (((0, 50), (0, 101)), ((50, 120), (33, 70)), ((119, 120), (0, 1))):
        part = probabilities(net, volume, inner=inner, y=y, x=x, batch=3)
        assert torch.allclose(part, whole[:, :, slice(*y), slice(*x)], atol=1e-6)


def test_the_window_of_the_input_itself_is_passed_on() -> None:
    volume = np.random.default_rng(3).integers(0, 255, (3, 40, 50), np.uint8)
    geometry = PlaneGeometry.of((40, 50), (40, 50), 16, 0.5)
    window = read_window(Planes(volume), geometry, AS_IT_IS, (1, 3), (5, 20), (30, 50))
    assert window.core_ZYX is not None and np.array_equal(window.core_ZYX, volume[1:3, 5:20, 30:50])


class Padded(TileNetwork):
    """Asks for full batches, as a recorded pass does, and poisons what does not count."""

    padded = True

    def probabilities(self, tiles_BTT: torch.Tensor) -> torch.Tensor:
        assert len(tiles_BTT) == 7
        return super().probabilities(tiles_BTT)


def test_tiles_that_fill_up_a_batch_change_nothing(toys: SimpleNamespace) -> None:
    volume = np.random.default_rng(4).normal(size=(2, 60, 45)).astype(np.float32)
    model = toys.conv().eval()
    plain = probabilities(network(model), volume, batch=7)
    filled = probabilities(Padded(model, classes=3, device=CPU), volume, batch=7)
    assert torch.equal(plain, filled)


def test_an_excluded_class_is_never_predicted(toys: SimpleNamespace) -> None:
    values = probabilities(network(toys.constant(), excluded=(2, 255)), np.zeros((1, 8, 8), np.float32), tile=16)
    assert not values[:, 2].any() and (values.argmax(1) == 0).all()


def test_autocast_still_returns_float32_probabilities(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(4).normal(size=(1, 20, 20)).astype(np.float32)
    result = probabilities(network(toys.conv(), autocast=torch.bfloat16), image, tile=16)
    assert result.dtype == torch.float32 and torch.allclose(result.sum(1), torch.ones(1, 20, 20), atol=1e-5)


def test_flips_are_averaged(toys: SimpleNamespace) -> None:
    tiles = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    model = toys.conv()
    found = network(model, tta=True).probabilities(tiles)
    plain = network(model)
    expected = sum(
        plain.probabilities(tiles.flip(axes)).flip([axis + 1 for axis in axes]) for axes in ((), (1,), (2,), (1, 2))
    )
    assert torch.allclose(found, expected / 4, atol=1e-6)
    assert not torch.allclose(found, plain.probabilities(tiles), atol=1e-3)


def test_clahe_sees_a_tile_at_a_time(toys: SimpleNamespace) -> None:
    image = np.random.default_rng(5).normal(size=(1, 96, 96)).astype(np.float32)
    intensity = IntensityMap(0.0, 1.0, clahe=True)
    seen: list[torch.Tensor] = []

    class Watching(TileNetwork):
        def probabilities(self, tiles_BTT: torch.Tensor) -> torch.Tensor:
            seen.append(tiles_BTT)
            return super().probabilities(tiles_BTT)

    probabilities(Watching(toys.constant(), classes=3, device=CPU), image, tile=96, overlap=0.0, intensity=intensity)
    middle = image[0][np.ix_(*2 * [np.r_[47:-1:-1, :48] % 96])]  # the tile that starts half a tile outside
    first = torch.cat(seen)[0].numpy()
    geometry = PlaneGeometry.of((96, 96), (96, 96), 96, 0.0)
    window = read_window(Planes(image), geometry, intensity, (0, 1), (0, 96), (0, 96))
    start = geometry.y.tiles.starts[0]
    rows = window.y.position[start - window.y.low :][:96]
    cut = window.planes_ZHW[0].numpy()[np.ix_(rows, rows)]
    assert middle.shape == cut.shape and np.allclose(first, intensity.equalise(cut), atol=1e-6)
    assert not np.allclose(first, cut, atol=1e-2)


class Greedy(torch.nn.Module):
    """Runs out of memory for more than `limit` tiles at a time."""

    def __init__(self, inner: torch.nn.Module, limit: int) -> None:
        super().__init__()
        self.inner, self.limit, self.sizes = inner, limit, list[int]()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.sizes.append(len(image))
        if len(image) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(image)


def test_validation_predicts_whole_planes_with_the_memory_there_is(
    toys: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(6).normal(size=(70, 50)).astype(np.float32)
    model = Greedy(toys.conv(), 3)
    monkeypatch.setattr(compute, "BAND_ROWS", (20, 30))
    found = predicted_classes(network(model), image, AS_IT_IS, tile=32, overlap=0.5, batch_size=8)
    assert model.sizes[:3] == [8, 4, 2]
    assert np.array_equal(found, probabilities(network(model.inner), image[None]).argmax(1)[0].numpy())


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(toys: SimpleNamespace) -> None:
    volume = np.random.default_rng(7).normal(size=(2, 150, 131)).astype(np.float32)
    expected = probabilities(network(toys.conv()), volume, tile=64)
    gpu = torch.device("cuda")
    for record in (False, True):
        net = TileNetwork(toys.conv().eval().to(gpu), classes=3, device=gpu, record=record)
        first, second = (probabilities(net, volume, tile=64, batch=8) for _ in range(2))
        assert torch.equal(first, second) and torch.allclose(first.cpu(), expected, atol=1e-3)
