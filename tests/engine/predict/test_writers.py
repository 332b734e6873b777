"""Label files: content, voxel size and names, in every dialect, from rows in uneven pieces."""

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
from affmae_engine.predict.label_rows import LabelRows, OutputInfo, label_dtype, regroup
from affmae_engine.predict.ome_zarr import ZarrRows, labels_attributes, probabilities_attributes
from affmae_engine.predict.tiff_labels import fits_imagej, write_tiff

NAMES = ("background", "membrane", "mitochondria")


def volume(shape: tuple[int, int, int], dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(dtype)


def info(labels: np.ndarray, pixel_nm: tuple[float | None, ...] = (40.0, 4.6, 4.6)) -> OutputInfo:
    return OutputInfo("labels", labels.shape, labels.dtype, pixel_nm, NAMES, {"weights": "runs/a"})


def pieces(labels: np.ndarray) -> Iterator[LabelRows]:
    for z, section in enumerate(labels):
        first = 0
        for count in [1, 7, 3, 64] * len(section):
            if first < len(section):
                yield LabelRows(z, first, section[first : first + count])
                first += count


@pytest.mark.parametrize("shape", [(3, 40, 30), (1, 700, 90), (2, 1, 1), (2, 3, 1), (5, 9, 1500)])
def test_imagej_tiff_is_readable_compressed_and_in_scale(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    labels = volume(shape)
    path = tmp_path / "a.tif"
    assert write_tiff(path, info(labels), pieces(labels)) == "ImageJ TIFF"
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_imagej and not tiff.is_bigtiff and not tiff.pages[0].is_tiled
        assert tiff.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert np.array_equal(tiff.asarray(), labels if shape[0] > 1 else labels[0])
        assert tiff.series[0].axes == ("ZYX" if shape[0] > 1 else "YX")
        assert len(tiff.pages) == shape[0]
        record = json.loads(tiff.imagej_metadata["Info"])["affmae"]
        assert record["class_names"] == list(NAMES) and record["weights"] == "runs/a"
    (source,) = open_sources(path)
    assert source.info.pixel_nm[0] == (40.0 if shape[0] > 1 else None)
    assert source.info.pixel_nm[1:] == pytest.approx((4.6, 4.6), rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 600, 530), (1, 5, 7)])
def test_big_volumes_become_ome_bigtiff_with_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(tiff_labels, "IMAGEJ_LIMIT", 10)
    labels = volume(shape)
    path = tmp_path / "a.tif"
    assert write_tiff(path, info(labels), pieces(labels)) == "OME-TIFF (BigTIFF)"
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff and tiff.is_ome and tiff.pages[0].is_tiled
        assert np.array_equal(tiff.asarray(), labels if shape[0] > 1 else labels[0])
        assert "mitochondria" in tiff.ome_metadata
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
    write_tiff(tmp_path / "a.tif", info(labels, known), pieces(labels))
    (source,) = open_sources(tmp_path / "a.tif")
    assert source.info.pixel_nm == pytest.approx(read_back)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        record = json.loads(tiff.imagej_metadata["Info"])["affmae"]
    assert record["pixel_nm_zyx"] == list(known)  # nothing that was known is lost


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


@pytest.mark.parametrize("shape", [(3, 40, 30), (40, 20, 20), (2, 1100, 600), (1, 1, 1)])
def test_ome_zarr_is_valid_and_complete(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    labels = volume(shape, "u2")
    colours = np.arange(9, dtype=np.uint8).reshape(3, 3)
    writer = ZarrRows(
        tmp_path / "a.ome.zarr",
        shape_ZYX=shape,
        dtype=labels.dtype,
        attributes=labels_attributes("a", (40.0, None, 4.6), NAMES, colours, {"weights": "runs/a"}),
        dimension_names=("z", "y", "x"),
    )
    for piece in pieces(labels):
        writer.add(piece.z, piece.first_row, piece.labels_RX)
    group = yaozarrs.validate_zarr_store(str(tmp_path / "a.ome.zarr"))
    assert group is not None
    array = zarr.open_group(tmp_path / "a.ome.zarr", mode="r")["0"]
    assert np.array_equal(array[:], labels)
    (source,) = open_sources(tmp_path / "a.ome.zarr", labels=True)
    assert source.info.pixel_nm == (40.0, None, 4.6)
    attributes = json.loads((tmp_path / "a.ome.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["ome"]["image-label"]["properties"][2] == {"label-value": 2, "class": "mitochondria"}
    assert attributes["affmae_prediction"]["weights"] == "runs/a"


def test_probabilities_have_a_channel_per_class(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 30, 20)).astype(np.uint8)
    writer = ZarrRows(
        tmp_path / "p.ome.zarr",
        shape_ZYX=(4, 30, 20),
        dtype=values.dtype,
        lead=(3,),
        attributes=probabilities_attributes("p", (40.0, 4.6, 4.6), NAMES, {}),
        dimension_names=("c", "z", "y", "x"),
    )
    for z in range(4):
        for first in range(0, 30, 11):
            writer.add(z, first, values[:, z, first : first + 11])
    assert yaozarrs.validate_zarr_store(str(tmp_path / "p.ome.zarr")) is not None
    assert np.array_equal(zarr.open_group(tmp_path / "p.ome.zarr", mode="r")["0"][:], values)


def test_rows_out_of_order_are_noticed(tmp_path: Path) -> None:
    labels = volume((2, 8, 8))
    swapped = [LabelRows(0, 4, labels[0, 4:]), LabelRows(0, 0, labels[0, :4])]
    with pytest.raises(ValueError, match="out of order"):
        list(regroup(swapped, 8, 3))
    with pytest.raises(ValueError, match="out of order"):
        write_tiff(tmp_path / "a.tif", info(labels), swapped)
