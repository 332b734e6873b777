"""Streaming statistics against numpy, the foreground rule, blank images, merging."""

import numpy as np
import pytest

from affmae_engine.data.statistics import PERCENTILES, Statistics, StatisticsBuilder


def gather(image: np.ndarray, rows: int = 7) -> Statistics:
    builder = StatisticsBuilder(image.dtype)
    for start in range(0, image.shape[0], rows):
        builder.add(image[start : start + rows])
    return builder.finish()


def noise(dtype: str, shape: tuple[int, int] = (200, 150)) -> np.ndarray:
    values = np.random.default_rng(0).normal(120, 30, shape)
    return values.clip(1, 254).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_agrees_with_numpy(dtype: str) -> None:
    image = noise(dtype)
    found = gather(image)
    assert found.count == image.size
    assert found.foreground == 1
    assert not found.blank
    assert found.mean == pytest.approx(image.mean(dtype=np.float64))
    assert found.std == pytest.approx(image.std(dtype=np.float64))
    assert (found.minimum, found.maximum) == (image.min(), image.max())
    for percent in PERCENTILES:
        assert found.percentiles[f"{percent:g}"] == pytest.approx(np.percentile(image, percent))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("border", [0, 255])
def test_blank_borders_are_left_out(dtype: str, border: int) -> None:
    inner = noise(dtype)
    padded = np.pad(inner, ((0, 0), (64, 90)), constant_values=border)
    found = gather(padded)
    assert found.count == inner.size
    assert found.mean == pytest.approx(inner.mean(dtype=np.float64))
    assert found.std == pytest.approx(inner.std(dtype=np.float64), rel=1e-6)
    assert found.foreground == pytest.approx(inner.size / padded.size)
    assert (found.minimum, found.maximum) == (inner.min(), inner.max())


@pytest.mark.parametrize("sides", [(64, 0), (0, 90), (64, 90)])
@pytest.mark.parametrize("white", [False, True])
def test_noisy_borders_are_left_out(sides: tuple[int, int], white: bool) -> None:
    inner = noise("uint8").clip(10, 240)
    left, right = (np.random.default_rng(k).integers(0, 4, (len(inner), n), np.uint8) for k, n in enumerate(sides))
    padded = np.concatenate([255 - left, inner, 255 - right] if white else [left, inner, right], axis=1)
    padded = np.concatenate([padded, np.full((20, padded.shape[1]), padded[0, 0] if sides[0] else padded[0, -1])])
    found = gather(padded)
    assert (found.count, found.minimum, found.maximum) == (inner.size, inner.min(), inner.max())
    assert found.mean == pytest.approx(inner.mean(dtype=np.float64))


def test_few_dark_pixels_are_not_padding() -> None:
    image = noise("uint8")
    image[0, :40] = 0  # one run, far below one per cent of the image
    assert gather(image).count == image.size


def test_two_valued_image_keeps_everything() -> None:
    image = np.zeros((64, 128), np.uint8)
    image[:, 64:] = 255
    found = gather(image)
    assert found.count == image.size
    assert found.mean == pytest.approx(127.5)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_constant_image_is_blank_and_finite(dtype: str) -> None:
    found = gather(np.full((40, 50), 7, dtype))
    assert found.blank
    assert (found.mean, found.std, found.count) == (7, 0, 2000)


def test_a_hot_pixel_does_not_hide_that_an_image_is_blank() -> None:
    image = np.zeros((100, 100), np.uint8)
    image[3, 4] = 255
    assert gather(image).blank


def test_nonfinite_values_are_counted_and_left_out() -> None:
    image = noise("float32")
    image[:5] = np.nan
    image[10, 3] = np.inf
    found = gather(image)
    finite = image[np.isfinite(image)]
    assert found.nonfinite == 5 * 150 + 1
    assert found.mean == pytest.approx(finite.mean(dtype=np.float64))
    assert found.foreground == pytest.approx(finite.size / image.size)
    everything = gather(np.full((4, 4), np.nan, np.float32))
    assert everything.nonfinite == 16
    assert everything.blank
    assert np.isfinite(everything.mean)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_merging_equals_one_pass(dtype: str) -> None:
    image = np.pad(noise(dtype), ((0, 0), (80, 0)))
    first, second = StatisticsBuilder(image.dtype), StatisticsBuilder(image.dtype)
    first.add(image[:77])
    second.add(image[77:])
    first.merge(second)
    whole = gather(image, rows=1000)
    merged = first.finish()
    assert merged.count == whole.count
    assert merged.mean == pytest.approx(whole.mean)
    assert merged.std == pytest.approx(whole.std)
    assert merged.percentiles == pytest.approx(whole.percentiles)
    with pytest.raises(ValueError, match="cannot merge"):
        first.merge(StatisticsBuilder(np.dtype(np.uint16)))


def test_many_floats_keep_good_percentiles() -> None:
    values = np.random.default_rng(1).normal(1000, 5, (1200, 1000)).astype(np.float32)
    found = gather(values, rows=100)
    assert found.percentiles["50"] == pytest.approx(np.median(values), abs=0.05)
    assert found.percentiles["99.5"] == pytest.approx(np.percentile(values, 99.5), abs=0.3)
    assert found.std == pytest.approx(values.std(dtype=np.float64), rel=1e-6)


def test_dictionary_round_trip() -> None:
    found = gather(noise("uint8"))
    assert Statistics.from_dict(found.to_dict()) == found
    with pytest.raises((KeyError, TypeError)):
        Statistics.from_dict({"mean": 1})
