"""Objects of small volumes: independence of blocks, seeds, linking, holes, restarts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage
from skimage.measure import label

from affmae_engine.errors import ConfigError
from affmae_engine.objects.decode import DecodeOptions
from affmae_engine.objects.job import Job
from affmae_engine.objects.make import make_objects
from affmae_engine.objects.maps import MapFiles, Maps
from affmae_engine.objects.scores import score_objects
from affmae_engine.objects.write import chunk_and_shard


def class_map(path: Path, classes: np.ndarray) -> Maps:
    tifffile.imwrite(path, classes.astype(np.uint8), photometric="minisblack")
    return Maps(MapFiles((path,), tuple(str(v) for v in np.unique(classes) if v) or ("1",)))


def made(maps: Maps, folder: Path, options: DecodeOptions, block: tuple[int, int, int] | None = None) -> np.ndarray:
    shutil.rmtree(folder, ignore_errors=True)
    job = Job(folder, maps.shape, block or maps.shape)
    job.open({}, overwrite=False)
    everything = tuple(slice(0, n) for n in maps.shape)
    return make_objects(job, maps, options).read(*everything)


def blobs(shape: tuple[int, ...], sigma: float | tuple[float, ...], seed: int, level: float = 0.0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise / noise.std() > level).astype(np.uint8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    npst.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(2, 8), st.integers(2, 8)),
                elements=st.sampled_from([0, 0, 1, 2])),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_components_do_not_depend_on_blocks(
    tmp_path: Path, classes: np.ndarray, block: tuple[int, int, int], sections: bool, fill: bool
) -> None:
    maps = class_map(tmp_path / "classes.tif", classes)
    options = DecodeOptions("components", sections=sections, fill_holes=fill, min_voxels=2)
    whole = made(maps, tmp_path / "whole", options)
    np.testing.assert_array_equal(made(maps, tmp_path / "parts", options, block), whole)
    if not sections and not fill:
        expected = label(classes, connectivity=1, background=0)
        sizes = np.bincount(expected.ravel())
        expected[(sizes < 2)[expected]] = 0
        assert [(whole == i).sum() for i in range(1, whole.max() + 1)] == [
            (expected == i).sum() for i in np.unique(expected) if i
        ]
        assert (np.unique(np.stack([expected.ravel(), whole.ravel()]), axis=1).shape[1]) == len(np.unique(expected))


@pytest.mark.parametrize(("sections", "join"), [(False, 1.0), (False, 0.75), (True, 0.75)])
def test_watershed_hardly_depends_on_blocks(tmp_path: Path, sections: bool, join: float) -> None:
    shape = (1, 260, 300) if sections else (70, 90, 100)
    maps = class_map(tmp_path / "classes.tif", blobs(shape, (0, 5, 5) if sections else 3, 2, -0.3))
    options = DecodeOptions(sections=sections, seed_distance=5, fill_holes=False, min_voxels=1, join_neck=join)
    whole = made(maps, tmp_path / "whole", options)
    assert whole.max() > 12
    parts = made(maps, tmp_path / "parts", options, (24, 40, 64))
    assert ((parts > 0) == (whole > 0)).all()
    assert score_objects(whole, parts).adapted_rand_error < 0.01


def test_watershed_divides_touching_disks_and_keeps_thin_objects(tmp_path: Path) -> None:
    y, x = np.ogrid[:80, :160]
    classes = np.zeros((1, 80, 160), np.uint8)
    for cx in (40, 72):
        classes[0][(y - 40) ** 2 + (x - cx) ** 2 <= 400] = 1
    classes[0, 10:12, 100:150] = 1  # too thin for a seed
    maps = class_map(tmp_path / "classes.tif", classes)
    objects = made(maps, tmp_path / "job", DecodeOptions(sections=True, seed_distance=14))
    assert objects.max() == 3
    assert len({objects[0, 40, 30], objects[0, 40, 82], objects[0, 10, 120]}) == 3
    assert objects[0, 40, 30] != 0
    assert made(maps, tmp_path / "job", DecodeOptions("components", sections=True)).max() == 2
    wide = DecodeOptions(sections=True, seed_distance=14, join_neck=0.5)
    assert made(maps, tmp_path / "job", wide).max() == 2


@pytest.mark.parametrize("block", [(1, 80, 160), (1, 17, 33)])
def test_varicosities_are_joined_but_not_cells_at_a_leak(tmp_path: Path, block: tuple[int, int, int]) -> None:
    y, x = np.ogrid[:80, :160]
    classes = np.zeros((1, 80, 160), np.uint8)
    for cx in (30, 70):  # a beaded process
        classes[0][(y - 20) ** 2 + (x - cx) ** 2 <= 64] = 1
    classes[0, 16:25, 30:70] = 1
    classes[0, 45:75, 10:60], classes[0, 45:75, 62:110] = 1, 1
    classes[0, 60:62, 60:62] = 1  # a leak
    maps = class_map(tmp_path / "classes.tif", classes)
    options = DecodeOptions(sections=True, seed_distance=6, join_neck=1.0)
    assert made(maps, tmp_path / "job", options, block).max() == 4
    assert made(maps, tmp_path / "job", replace(options, join_neck=0.5), block).max() == 3


def test_boundary_map_divides_what_the_class_map_joins(tmp_path: Path) -> None:
    classes = np.ones((1, 60, 120), np.uint8)
    boundary = np.zeros((1, 60, 120), np.uint8)
    boundary[0, :, 58:61] = 255
    boundary[0, 30, 58:61] = 0  # a gap of one pixel
    tifffile.imwrite(tmp_path / "classes.tif", classes[0], photometric="minisblack")
    tifffile.imwrite(tmp_path / "boundary.tif", boundary[0], photometric="minisblack")
    files = MapFiles((tmp_path / "classes.tif",), ("1",), tmp_path / "boundary.tif")
    objects = made(Maps(files), tmp_path / "job", DecodeOptions(sections=True, seed_distance=4))
    assert objects.max() == 2
    assert (objects[0, :, :58] == objects[0, 0, 0]).all() and (objects[0, :, 61:] == objects[0, 0, 119]).all()


def test_sections_are_linked_and_a_missing_one_is_bridged(tmp_path: Path) -> None:
    classes = np.zeros((8, 60, 100), np.uint8)
    for z in range(8):
        classes[z, 10 : 30 + z, 10 + 2 * z : 40 + 2 * z] = 1
        classes[z, 40:55, 60:90] = 1
    classes[4] = 0
    maps = class_map(tmp_path / "classes.tif", classes)
    options = DecodeOptions("components", sections=True)
    objects = made(maps, tmp_path / "job", options, (3, 32, 40))
    assert objects.max() == 2
    assert objects[0, 15, 20] == objects[7, 15, 30] != objects[0, 45, 70]
    assert made(maps, tmp_path / "job", replace(options, bridge=0)).max() == 4
    classes[3] = 0
    assert made(class_map(tmp_path / "classes.tif", classes), tmp_path / "job", options).max() == 4
    assert made(class_map(tmp_path / "classes.tif", classes), tmp_path / "job", replace(options, bridge=2)).max() == 2


def test_objects_apart_in_the_plane_are_not_linked(tmp_path: Path) -> None:
    classes = np.zeros((2, 40, 40), np.uint8)
    classes[0, 5:20, 5:20] = 1
    classes[1, 18:33, 18:33] = 1  # overlaps in 2 x 2 pixels
    maps = class_map(tmp_path / "classes.tif", classes)
    assert made(maps, tmp_path / "job", DecodeOptions("components", sections=True)).max() == 2


def test_holes_of_one_object_are_filled_across_blocks(tmp_path: Path) -> None:
    classes = np.zeros((40, 40, 40), np.uint8)
    classes[5:35, 5:35, 5:35] = 1
    classes[12:20, 12:20, 12:20] = 0  # a cavity, across the faces of blocks
    classes[25:28, 25:28, 5:28] = 0  # open to the outside
    maps = class_map(tmp_path / "classes.tif", classes)
    options = DecodeOptions("components")
    filled = made(maps, tmp_path / "job", options, (16, 16, 16))
    expected = ndimage.binary_fill_holes(classes)
    np.testing.assert_array_equal(filled > 0, expected)
    assert not made(maps, tmp_path / "job", replace(options, fill_holes=False))[15, 15, 15]


def test_background_between_two_objects_is_no_hole(tmp_path: Path) -> None:
    classes = np.ones((1, 40, 40), np.uint8)
    classes[0, :, 20:] = 2
    classes[0, 15:25, 15:25] = 0
    maps = class_map(tmp_path / "classes.tif", classes)
    assert not made(maps, tmp_path / "job", DecodeOptions("components", sections=True))[0, 20, 20]


def test_small_and_short_objects_are_removed(tmp_path: Path) -> None:
    classes = np.zeros((6, 40, 40), np.uint8)
    classes[:, 2:12, 2:12], classes[2, 20:35, 20:35], classes[:, 30:32, 2:4] = 1, 1, 1
    maps = class_map(tmp_path / "classes.tif", classes)
    base = DecodeOptions("components")
    assert made(maps, tmp_path / "job", base).max() == 3
    assert made(maps, tmp_path / "job", replace(base, min_voxels=30)).max() == 2
    assert made(maps, tmp_path / "job", replace(base, min_span=2)).max() == 2


@pytest.mark.parametrize("field", [{"foreground": 1.5}, {"seed_distance": 0}, {"min_voxels": 0}, {"bridge": 9}])
def test_options_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        DecodeOptions(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize(("block", "length"), [(250, 250), (192, 1000), (131, 1000), (7, 7), (1, 1), (100, 300)])
def test_shards_are_blocks_of_chunks_that_are_not_tiny(block: int, length: int) -> None:
    chunk, shard = chunk_and_shard(block, length, 128)
    assert shard % chunk == 0 and shard >= block
    assert shard == block or block >= length
    assert 4 * chunk >= min(128, block) and chunk <= max(128, block)
