"""Label files: content, voxel size, names and colors, in every dialect."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr

from affmae_engine.data.readers import open_sources
from affmae_engine.predict import tiff_labels
from affmae_engine.predict.grid import Grid
from affmae_engine.predict.predictor import label_dtype
from affmae_engine.predict.tiff_labels import OutputInfo, fits_imagej, rows_per_band, write_tiff
from affmae_engine.predict.volume import Pyramid, image_attributes, labels_attributes, probabilities_attributes
from affmae_engine.visualize import class_colours

NAMES = ("background", "membrane", "mitochondria")


def volume(shape: tuple[int, int, int], dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(dtype)


def info(labels: np.ndarray, pixel_nm: tuple[float | None, ...] = (40.0, 4.6, 4.6)) -> OutputInfo:
    return OutputInfo("labels", labels.shape, labels.dtype, pixel_nm, NAMES, {"weights": "runs/a"})


def bands(labels: np.ndarray, about: OutputInfo) -> Iterator[np.ndarray]:
    rows = rows_per_band(about)
    for section in labels:
        for first in range(0, len(section), rows):
            yield section[first : first + rows]


def write(path: Path, labels: np.ndarray, about: OutputInfo) -> str:
    return write_tiff(path, about, bands(labels, about))


@pytest.mark.parametrize("shape", [(3, 40, 30), (1, 700, 90), (2, 1, 1), (2, 3, 1), (5, 9, 1500), (2, 1200, 700)])
def test_imagej_tiff_is_readable_compressed_and_in_scale(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    labels = volume(shape)
    path = tmp_path / "a.tif"
    assert write(path, labels, info(labels)) == "ImageJ TIFF"
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_imagej and not tiff.is_bigtiff and not tiff.pages[0].is_tiled
        assert tiff.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert np.array_equal(tiff.asarray(), labels if shape[0] > 1 else labels[0])
        assert tiff.series[0].axes == ("ZYX" if shape[0] > 1 else "YX")
        assert len(tiff.pages) == shape[0]
        assert json.loads(tiff.imagej_metadata["Info"])["affmae"]["weights"] == "runs/a"
        assert tiff.imagej_metadata["spacing"] == pytest.approx(0.04)  # of a single section too
    (source,) = open_sources(path)
    assert source.info.pixel_nm[1:] == pytest.approx((4.6, 4.6), rel=1e-6)


def test_imagej_shows_classes_in_their_colors(tmp_path: Path) -> None:
    labels = volume((2, 8, 8))
    write(tmp_path / "a.tif", labels, info(labels))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        table = np.asarray(tiff.pages[0].tags[320].value).reshape(3, 256)
        assert (tiff.imagej_metadata["min"], tiff.imagej_metadata["max"]) == (0, 255)
    assert np.array_equal(table[:, 1:3].T // 257, class_colours(3)[1:]) and not table[:, 0].any()
    wide = labels.astype("u2")
    write(tmp_path / "b.tif", wide, info(wide))
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        assert 320 not in tiff.pages[0].tags and tiff.imagej_metadata["max"] == 2


@pytest.mark.parametrize("shape", [(2, 600, 530), (1, 5, 7)])
def test_big_volumes_become_ome_bigtiff_with_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(tiff_labels, "IMAGEJ_LIMIT", 10)
    labels = volume(shape)
    path = tmp_path / "a.tif"
    assert write(path, labels, info(labels)) == "OME-TIFF (BigTIFF)"
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff and tiff.is_ome and tiff.pages[0].is_tiled
        assert np.array_equal(tiff.asarray(), labels if shape[0] > 1 else labels[0])
        assert "runs/a" in tiff.ome_metadata
    (source,) = open_sources(path)
    assert source.info.pixel_nm == pytest.approx((40.0, 4.6, 4.6), rel=1e-6)
    assert source.info.shape_ZYX == shape


@pytest.mark.parametrize(
    ("known", "read_back"),
    [
        ((None, None, None), (None, None, None)),
        ((40.0, None, None), (None, None, None)),
        ((40.0, 5.0, None), (None, None, None)),
        ((None, 5.0, 4.0), (None, 5.0, 4.0)),
    ],
)
def test_unknown_pixel_size_stays_unknown(
    tmp_path: Path, known: tuple[float | None, ...], read_back: tuple[float | None, ...]
) -> None:
    labels = volume((2, 8, 8))
    write(tmp_path / "a.tif", labels, info(labels, known))
    (source,) = open_sources(tmp_path / "a.tif")
    assert source.info.pixel_nm == pytest.approx(read_back)


def test_imagej_limits() -> None:
    labels = volume((1, 1, 1))
    small = OutputInfo("a", (4000, 1000, 1000), labels.dtype, (None,) * 3, NAMES, {})
    assert fits_imagej(small)
    assert not fits_imagej(OutputInfo("a", (4400, 1000, 1000), labels.dtype, (None,) * 3, NAMES, {}))
    assert not fits_imagej(OutputInfo("a", (1, 50_000, 50_000), labels.dtype, (None,) * 3, NAMES, {}))
    assert not fits_imagej(OutputInfo("a", (1, 10, 10), np.dtype("u4"), (None,) * 3, NAMES, {}))


@pytest.mark.parametrize(("classes", "dtype"), [(1, "u1"), (2, "u1"), (256, "u1"), (257, "u2"), (65_537, "u4")])
def test_labels_take_the_smallest_type(classes: int, dtype: str) -> None:
    assert label_dtype(classes) == np.dtype(dtype)


@pytest.mark.parametrize("shape", [(3, 40, 30), (40, 20, 20), (1, 4100, 60), (1, 1, 1), (2, 1030, 4200)])
def test_a_pyramid_of_labels_is_valid_and_complete(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    labels = volume(shape, "u2")
    grid = Grid.choose(shape, classes=3, device="cpu")
    pyramid = Pyramid(tmp_path / "a.ome.zarr", grid, labels.dtype)
    levels = len(pyramid.levels)
    pyramid.create(labels_attributes("a", (40.0, None, 4.6), levels, NAMES, {"weights": "runs/a"}))
    for index in reversed(range(len(grid))):
        pyramid.write(grid[index], labels[grid[index].slices])
        assert all(file.exists() for file in pyramid.files(grid[index]))
    assert yaozarrs.validate_zarr_store(str(tmp_path / "a.ome.zarr")) is not None
    for k in range(levels):
        array = zarr.open_array(tmp_path / "a.ome.zarr" / str(k), mode="r")
        assert np.array_equal(array[:], labels[:, :: 1 << k, :: 1 << k])
    assert levels == 1 or max(labels.shape[1:]) >> (levels - 1) <= 1024
    attributes = json.loads((tmp_path / "a.ome.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["ome"]["image-label"]["properties"][2] == {"label-value": 2, "class": "mitochondria"}
    scales = [d["coordinateTransformations"][0]["scale"] for d in attributes["ome"]["multiscales"][0]["datasets"]]
    assert scales == [[40.0, 1.0 * 2**k, 4.6 * 2**k] for k in range(levels)]


def test_a_killed_writers_leftovers_go(tmp_path: Path) -> None:
    grid = Grid((1, 8, 8), (1, 8, 8))
    pyramid = Pyramid(tmp_path / "a.zarr", grid, np.dtype("u1"))
    pyramid.create({})
    (file,) = pyramid.files(grid[0])
    file.parent.mkdir(parents=True)
    (file.parent / "0.1234abcd.partial").touch()
    pyramid.write(grid[0], np.ones((1, 8, 8), np.uint8))
    assert [entry.name for entry in file.parent.iterdir()] == ["0"]


def test_probabilities_have_a_channel_per_class_and_images_a_window(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 30, 20)).astype(np.uint8)
    grid = Grid((4, 30, 20), (2, 30, 20))
    pyramid = Pyramid(tmp_path / "p.ome.zarr", grid, values.dtype, 3)
    pyramid.create(probabilities_attributes("p", (40.0, 4.6, 4.6), 1, NAMES, {}))
    image = Pyramid(tmp_path / "i.zarr", grid, values.dtype)
    image.create(image_attributes("i", (40.0, 4.6, 4.6), 1, (3.0, 250.0), {}))
    for index in range(len(grid)):
        pyramid.write(grid[index], values[(slice(None), *grid[index].slices)])
        image.write(grid[index], values[(0, *grid[index].slices)])
    for path in (pyramid.folder, image.folder):
        assert yaozarrs.validate_zarr_store(str(path)) is not None
    assert np.array_equal(zarr.open_group(pyramid.folder, mode="r")["0"][:], values)
    assert np.array_equal(zarr.open_group(image.folder, mode="r")["0"][:], values[0])
