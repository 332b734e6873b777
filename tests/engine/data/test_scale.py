"""Pixel sizes: when they differ, what is said of it, and resampling of images with their labels."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile

from affmae_engine.data.labels.gather import at_scale, gather_labels, write_labelled_store
from affmae_engine.data.readers import open_sources
from affmae_engine.data.scale import Rescaled, common_edge_nm, differ, scale_warnings, size_groups

ALL = slice(None)


def size(nm: float | None) -> tuple[float | None, float | None, float | None]:
    return None, nm, nm


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(4.0, 4.5, False), (4.0, 4.61, True), (4.61, 4.0, True), (None, 4.0, False), (4.0, None, False)],
)
def test_sizes_differ_by_more_than_15_percent(first: float | None, second: float | None, expected: bool) -> None:
    assert differ(first, second) is expected


def test_mixed_sizes_and_other_weights_are_said_with_numbers() -> None:
    mixed = [size(4), size(16), size(4.2), size(None)]
    assert size_groups(mixed) == [(4.0, 2), (16.0, 1)]
    (text,) = scale_warnings(mixed)
    assert "4 nm (2 images), 16 nm (1 image)" in text
    (text,) = scale_warnings([size(10)], 4.6)
    assert "4.6 nm" in text and "10 nm" in text
    assert scale_warnings([size(4.6), size(4.8)], 4.6) == scale_warnings([size(None)], 4.6) == []
    assert common_edge_nm(mixed, None) == 4.2 and common_edge_nm(mixed, 8.0) == 8.0
    assert common_edge_nm([size(None)], None) is None


def save(path: Path, array: np.ndarray, nm: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution = (1000 / nm, 1000 / nm)
    tifffile.imwrite(path, array, imagej=True, resolution=resolution, metadata={"axes": "YX", "unit": "um"})


@pytest.mark.parametrize("factor", [0.5, 2])
def test_images_and_labels_are_resampled_together(tmp_path: Path, factor: float) -> None:
    y, x = np.mgrid[:64, :96]
    image = (20 + 2 * y).astype(np.uint8)
    truth = (x // 12 % 3).astype(np.uint8)
    save(tmp_path / "I/a.tif", image, 8.0)
    save(tmp_path / "L/a.tif", truth, 8.0)
    save(tmp_path / "I/b.tif", image.T.copy(), 8 / factor)
    save(tmp_path / "L/b.tif", truth.T.copy(), 8 / factor)
    labelled = at_scale(gather_labels([tmp_path / "I"], [tmp_path / "L"]), 8 / factor)
    store, _ = write_labelled_store(labelled, tmp_path / "data.zarr")
    assert store["a"].shape_ZYX == (1, 64 * factor, 96 * factor) and store["b"].shape_ZYX == (1, 96, 64)
    assert store["a"].pixel_nm[1:] == pytest.approx((8 / factor, 8 / factor))
    found = store.read("a", ALL, ALL, ALL)[0].astype(float)
    rows = (np.arange(64 * factor) + 0.5) / factor - 0.5
    assert np.abs(found - (20 + 2 * rows)[:, None])[4:-4].max() <= 1
    labels = store.read_labels("a", ALL, ALL, ALL)[0]
    np.testing.assert_array_equal(labels[0], np.repeat(truth[0], 2) if factor == 2 else truth[0, 1::2])


def test_a_resampled_source_reads_any_part_and_can_be_pickled(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (50, 70), dtype=np.uint8), 4.0)
    (source,) = open_sources(tmp_path / "a.tif")
    rescaled = Rescaled(source, 3.0, like=source)
    whole = rescaled.read(ALL, ALL, ALL)
    part = pickle.loads(pickle.dumps(rescaled)).read(ALL, slice(7, 31), slice(11, 60))  # noqa: S301 (our own bytes)
    np.testing.assert_array_equal(part, whole[:, 7:31, 11:60])
    assert whole.shape == (1, 67, 93) and whole.dtype == np.uint8
