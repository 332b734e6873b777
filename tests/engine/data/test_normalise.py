"""Intensity maps: any dtype and any defect in, finite standardised float32 out."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from affmae_engine.config import DataConfig
from affmae_engine.data.normalise import OUTLIER, IntensityMap, Normalisation
from affmae_engine.errors import CorruptError


def statistics_of(array: np.ndarray) -> Any:
    low, high = np.percentile(array.astype(np.float64), (0.5, 99.5))
    mean, std = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    return SimpleNamespace(mean=mean, std=std, percentiles={"0.5": low, "99.5": high})


def plane(dtype: str, scale: float, offset: float) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, scale, (96, 128)) + offset
    return values.astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [
        ("uint8", 30, 128),
        ("uint16", 900, 30_000),
        ("int16", 500, -2_000),
        ("uint32", 3, 4_000_000_000),
        ("float16", 0.1, 2),
        ("float32", 1e-6, 0),
        ("float64", 1e-3, 1e6),
        (">u2", 100, 500),
    ],
)
def test_zero_mean_and_unit_deviation(dtype: str, scale: float, offset: float) -> None:
    array = plane(dtype, scale, offset)
    result = Normalisation().for_image(statistics_of(array))(array)
    assert result.dtype == np.float32
    assert result.shape == array.shape
    assert abs(result.mean()) < 1e-3
    assert abs(result.std() - 1) < 1e-2


def test_defects_become_the_mean_and_outliers_are_cut() -> None:
    array = plane("float32", 1, 5)
    mapping = Normalisation().for_image(statistics_of(array))
    array[0, :5] = np.nan, np.inf, -np.inf, 1e30, -1e30
    result = mapping(array)
    assert np.isfinite(result).all()
    assert result[0, :5].tolist() == [0, 0, 0, OUTLIER, -OUTLIER]


@pytest.mark.parametrize("array", [np.full((8, 8), 7, np.uint8), np.full((8, 8), 0.1, np.float32)])
@pytest.mark.parametrize("clahe", [False, True])
def test_constant_images_give_zeros(array: np.ndarray, clahe: bool) -> None:
    result = Normalisation(clahe=clahe).for_image(statistics_of(array))(array)
    assert result.dtype == np.float32
    assert not result.any()


def test_all_nan_image_gives_zeros() -> None:
    nothing = SimpleNamespace(mean=float("nan"), std=float("nan"), percentiles={})
    assert not Normalisation().for_image(nothing)(np.full((4, 4), np.nan, np.float32)).any()  # type: ignore[arg-type]


def test_dataset_mode_takes_the_stored_figures() -> None:
    store = SimpleNamespace(statistics=SimpleNamespace(mean=100.0, std=20.0))
    normalisation = Normalisation.from_store(DataConfig(normalisation="dataset"), store)  # type: ignore[arg-type]
    array = np.array([[100, 120, 80]], np.uint8)
    assert normalisation.for_image(statistics_of(array))(array).tolist() == [[0.0, 1.0, -1.0]]


def test_clahe_raises_local_contrast_and_stays_bounded() -> None:
    rng = np.random.default_rng(1)
    array = rng.normal(0, 2, (256, 256)) + np.linspace(0, 200, 256)[None, :]  # faint detail on a strong ramp
    array = array.astype(np.float32)
    flat = Normalisation().for_image(statistics_of(array))(array)
    equalised = Normalisation(clahe=True).for_image(statistics_of(array))(array)
    detail = lambda image: float(np.diff(image, axis=0).std())  # noqa: E731
    assert detail(equalised) > 1.5 * detail(flat)
    assert abs(equalised.mean()) < 0.3
    assert 0.7 < equalised.std() < 1.3
    assert np.abs(equalised).max() <= 2.0 + 1e-6


def test_clahe_of_a_part_resembles_the_part_of_clahe() -> None:
    rng = np.random.default_rng(2)
    array = rng.normal(128, 30, (512, 512)).clip(0, 255).astype(np.uint8)
    mapping = Normalisation(clahe=True).for_image(statistics_of(array))
    whole, part = mapping(array), mapping(array[128:384, 128:384])
    inner = slice(64, 192)
    assert np.abs(whole[128:384, 128:384] - part)[inner, inner].mean() < 0.1


def test_clahe_survives_rounding_of_its_limits() -> None:
    plane = np.full((8, 8), 255, np.uint8)
    plane[0, 0] = 0
    for step in range(200):  # for some limits the stretched maximum rounds to just above 1
        result = IntensityMap(128.0, 50.0, -2.0 - step * 0.0137, 1.5 + step * 0.0029, clahe=True)(plane)
        assert np.isfinite(result).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 40, 40), (1, 2, 70, 30)])
def test_clahe_of_odd_shapes(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    result = IntensityMap(128.0, 50.0, clahe=True)(array)
    assert result.shape == shape
    assert np.isfinite(result).all()


def test_record_survives_json() -> None:
    normalisation = Normalisation("dataset", 123.25, 40.5, True)
    assert Normalisation.from_dict(json.loads(json.dumps(normalisation.to_dict()))) == normalisation


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"mode": "image"},
        {"mode": "other", "mean": 0, "std": 1, "clahe": False},
        {**Normalisation().to_dict(), "mean": "x"},
    ],
)
def test_broken_record(record: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="normalisation"):
        Normalisation.from_dict(record)
