"""A small dataset store from arrays, for every test of the engine that reads images."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tifffile

from affmae_engine.data.labels.gather import gather_labels, write_labelled_store
from affmae_engine.data.statistics import StatisticsBuilder
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import StoredImage
from affmae_engine.data.store_writer import StoreWriter

StoreMaker = Callable[..., Store]


@pytest.fixture
def make_store(tmp_path: Path) -> StoreMaker:
    """make_store({"name": array [Z, Y, X], ...}, pixel_nm=(z, y, x)) -> an opened Store in a temporary folder."""

    def make(images: Mapping[str, np.ndarray], pixel_nm: tuple[float | None, ...] = (None, None, None)) -> Store:
        path = tmp_path / "data.zarr"
        with StoreWriter(path) as writer:
            for name, block in images.items():
                builder = StatisticsBuilder(block.dtype)
                builder.add(block)
                image = StoredImage(
                    name=name,
                    shape_ZYX=block.shape,  # type: ignore[arg-type]
                    dtype=block.dtype,
                    pixel_nm=pixel_nm,  # type: ignore[arg-type]
                    statistics=builder.finish(),
                    source_path=f"/source/{name}.tif",
                    source_series="",
                    sha256=name,
                )
                one = writer.begin(name, {"sha256": name}, image, None)
                for band in one.bands:
                    one.write(band, block[band.z, band.y])
                one.finish(one.image)
        return Store.open(path)

    return make


@pytest.fixture
def make_labelled_store(tmp_path: Path) -> StoreMaker:
    """make_labelled_store({"name": (image [Z, Y, X], labels [Z, Y, X])}, **options of gather_labels) -> Store."""

    def make(images: Mapping[str, tuple[np.ndarray, np.ndarray]], **options: object) -> Store:
        for name, arrays in images.items():
            for folder, array in zip(("images", "labels"), arrays, strict=True):
                (tmp_path / folder).mkdir(exist_ok=True)
                tifffile.imwrite(tmp_path / folder / f"{name}.tif", array, photometric="minisblack")
        labelled = gather_labels([tmp_path / "images"], [tmp_path / "labels"], **options)  # type: ignore[arg-type]
        return write_labelled_store(labelled, tmp_path / "labelled.zarr")[0]

    return make
