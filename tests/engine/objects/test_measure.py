"""Measurements against formulas, scikit-image and brute force, and their independence of blocks."""

import csv
import io
import itertools
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage
from skimage.measure import perimeter_crofton, regionprops

from affmae_engine.objects.blocks import Block, blocks
from affmae_engine.objects.measure import Gathered, Inputs, ObjectTable, gather_all, merge, table
from affmae_engine.objects.report import csv_text, summarize
from affmae_engine.objects.surface import crossing_areas


def measured(
    labels: np.ndarray,
    voxel: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    size: tuple[int, int, int] = (64, 64, 64),
    image: np.ndarray | None = None,
    class_map: np.ndarray | None = None,
    hosts: np.ndarray | None = None,
) -> ObjectTable:
    return table(gathered(labels, size, image, class_map, hosts), labels.shape, voxel, "nm")


def gathered(
    labels: np.ndarray,
    size: tuple[int, int, int],
    image: np.ndarray | None = None,
    class_map: np.ndarray | None = None,
    hosts: np.ndarray | None = None,
) -> Gathered:
    def reader(array: np.ndarray | None):
        return None if array is None else lambda z, y, x: array[z, y, x]

    inputs = Inputs(labels.shape, reader(labels), reader(image), reader(class_map), reader(hosts))
    return gather_all(inputs, blocks(labels.shape, size))


def ball(shape: tuple[int, int, int], center: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    grid = np.indices(shape, np.float64)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii, strict=True)) <= 1


volumes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)).flatmap(
    lambda shape: st.tuples(
        npst.arrays(np.uint32, shape, elements=st.sampled_from([0, 0, 1, 2, 7])),
        npst.arrays(np.uint16, shape),
        npst.arrays(np.uint8, shape, elements=st.integers(0, 3)),
    )
)


@settings(max_examples=60, deadline=None)
@given(volumes, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
def test_results_do_not_depend_on_the_block_size(volume: tuple[np.ndarray, ...], size: tuple[int, int, int]) -> None:
    labels, image, classes = volume
    whole = gathered(labels, labels.shape, image, classes, classes)
    parts = gathered(labels, size, image, classes, classes)
    np.testing.assert_equal(asdict(parts), asdict(whole))


@settings(max_examples=60, deadline=None)
@given(volumes)
def test_sizes_extents_and_grey_values_equal_regionprops(volume: tuple[np.ndarray, ...]) -> None:
    labels, image, classes = volume
    result = measured(labels, (3.0, 2.0, 1.0), size=(2, 3, 3), image=image, class_map=classes)
    regions = regionprops(labels.astype(np.int64), intensity_image=image.astype(np.float64))
    assert [r.label for r in regions] == result.ids_N.tolist()
    scale = np.array([1.0 if result.flat else 3.0, 2.0, 1.0])
    for i, region in enumerate(regions):
        assert result.voxels_N[i] == region.num_pixels
        assert result.size_N[i] == pytest.approx(region.num_pixels * scale.prod())
        np.testing.assert_allclose(result.centroid_N3[i], (np.array(region.centroid) + 0.5) * scale)
        np.testing.assert_allclose(result.low_N3[i], np.array(region.bbox[:3]) * scale)
        np.testing.assert_allclose(result.high_N3[i], np.array(region.bbox[3:]) * scale)
        assert result.grey_N[i] == pytest.approx(region.intensity_mean)
        inside = classes[labels == region.label]
        assert result.class_N[i] == np.bincount(inside).argmax()


@settings(max_examples=40, deadline=None)
@given(volumes)
def test_crossings_equal_a_count_over_neighbors(volume: tuple[np.ndarray, ...]) -> None:
    labels = volume[0]
    found = gathered(labels, (2, 2, 3))
    padded = np.pad(labels, 1)
    for i, one in enumerate(found.ids_N):
        inside = padded == one
        flips = [
            (inside != np.roll(inside, step, (0, 1, 2))).sum()
            for step in itertools.product((-1, 0, 1), repeat=3)
            if step > (0, 0, 0) and (labels.shape[0] > 1 or step[0] == 0)
        ]
        assert sorted(found.crossings_ND[i].tolist()) == sorted(flips)


@pytest.mark.parametrize("voxel", [(1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (2.0, 1.0, 1.5)])
def test_a_ball_has_the_surface_volume_and_axes_of_a_sphere(voxel: tuple[float, float, float]) -> None:
    radius = 20.0
    radii = tuple(radius / v for v in voxel)
    shape = tuple(int(2 * r) + 5 for r in radii)
    labels = ball(shape, tuple(n / 2 - 0.4 for n in shape), radii).astype(np.uint8)
    result = measured(labels, voxel, size=(16, 16, 16))
    assert result.size_N[0] == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    assert result.border_N[0] == pytest.approx(4 * np.pi * radius**2, rel=0.04)
    assert result.diameter_N[0] == pytest.approx(2 * radius, rel=0.01)
    assert result.roundness_N[0] == pytest.approx(1, abs=0.04)
    np.testing.assert_allclose(result.axes_N3[0], 2 * radius, rtol=0.02)
    assert not result.touches_border_N[0]


def test_ellipsoid_axes() -> None:
    labels = ball((30, 60, 90), (15, 30, 45), (10, 20, 40)).astype(np.uint8)
    np.testing.assert_allclose(measured(labels).axes_N3[0], (80, 40, 20), rtol=0.02)
    turned = ndimage.rotate(labels, 35, axes=(1, 2), order=0)
    np.testing.assert_allclose(measured(turned).axes_N3[0], (80, 40, 20), rtol=0.03)


def test_perimeter_equals_scikit_image_and_a_disk_is_round() -> None:
    disk = ball((1, 120, 120), (0, 58.3, 61.2), (1, 45, 45)).astype(np.uint8)
    result = measured(disk, size=(1, 50, 50))
    assert result.border_N[0] == pytest.approx(perimeter_crofton(disk[0], directions=4), rel=1e-9)
    assert result.border_N[0] == pytest.approx(2 * np.pi * 45, rel=0.02)
    assert result.roundness_N[0] == pytest.approx(1, abs=0.03)
    assert result.axes_N3[0, 0] == pytest.approx(90, rel=0.02)
    assert np.isnan(result.axes_N3[0, 1])


def test_each_direction_stands_for_its_share_of_the_sphere() -> None:
    lengths = np.linalg.norm([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)], axis=1)
    shares = crossing_areas((1.0, 1.0, 1.0)) * lengths / 2
    assert shares.sum() == pytest.approx(1)
    # Legland et al. 2007, table 1: axes, diagonals of faces, diagonals of cubes.
    for length, share in ((1, 0.0457779), (np.sqrt(2), 0.0369806), (np.sqrt(3), 0.0351956)):
        np.testing.assert_allclose(shares[np.isclose(lengths, length)], 2 * share, rtol=1e-4)


def test_large_coordinates_do_not_overflow() -> None:
    offset = 1 << 22

    def read(z: slice, y: slice, x: slice) -> np.ndarray:
        index = np.ogrid[z, y, x]
        return ((index[0] >= offset) & (index[1] >= offset) & (index[2] >= offset)).astype(np.uint8)

    volume = (offset + 2,) * 3
    far = Block(0, (0, 0, 0), (offset,) * 3, (offset + 2,) * 3)
    part = gather_all(Inputs(volume, read), [far])
    assert part.products_N6[0, 0] == 8 * offset**2 + 8 * offset + 4
    np.testing.assert_allclose(table(merge([part]), volume, (1, 1, 1), "px").axes_N3[0], 2 * np.sqrt(5 / 3))


def test_nearest_neighbors_are_of_the_same_class() -> None:
    labels = np.zeros((1, 10, 40), np.uint8)
    classes = np.zeros_like(labels)
    for i, (x, one) in enumerate(((2, 1), (12, 1), (15, 2), (33, 2)), 1):
        labels[0, 4:7, x : x + 3] = i
        classes[0, 4:7, x : x + 3] = one
    result = measured(labels, (1.0, 2.0, 2.0), class_map=classes)
    assert result.neighbor_N.tolist() == [2, 1, 4, 3]
    np.testing.assert_allclose(result.neighbor_distance_N, [20, 20, 36, 36])
    lone = measured(labels * (labels == 1))
    assert lone.neighbor_N[0] == 0 and np.isnan(lone.neighbor_distance_N[0])


def test_enclosing_object_from_contacts_and_from_a_second_volume() -> None:
    cells = np.zeros((8, 20, 40), np.uint16)
    cells[:, :, :19], cells[:, :, 20:] = 10, 20
    both = cells.copy()
    both[3:6, 5:9, 5:9] = 1
    both[3:6, 5:9, 25:29] = 2
    both[0:2, 0:3, 17:21] = 3  # half in each cell, and bounded by the border
    classes = np.where(both >= 10, 1, np.where(both > 0, 2, 0)).astype(np.uint8)
    inner = dict(
        zip(*(lambda t: (t.ids_N.tolist(), t.host_N.tolist()))(measured(both, class_map=classes)), strict=True)
    )
    assert (inner[1], inner[2], inner[3], inner[10], inner[20]) == (10, 20, 0, 0, 0)
    organelles = np.where(both < 10, both, 0)
    assert measured(organelles, hosts=cells).host_N[:2].tolist() == [10, 20]


def test_csv_has_units_in_its_header_and_one_row_per_object() -> None:
    labels = np.zeros((4, 8, 8), np.uint64)
    labels[1:3, 1:4, 1:4], labels[0, 6:, 6:] = 2**40, 7
    result = table(gathered(labels, (2, 4, 4)), labels.shape, (0.04, 0.005, 0.005), "um", class_of={7: 1},
                   class_names=("background", "mitochondria"))  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert [row["id"] for row in rows] == ["7", str(2**40)]
    assert [row["class"] for row in rows] == ["mitochondria", ""]
    assert float(rows[1]["volume_um3"]) == pytest.approx(18 * 0.04 * 0.005**2)
    assert {"surface_um2", "equivalent_diameter_um", "sphericity", "centroid_z_um", "bbox_low_x_um"} <= rows[0].keys()
    assert [row["touches_border"] for row in rows] == ["1", "0"]
    assert rows[0]["mean_gray"] == ""
    summaries = {s.class_name: s for s in summarize(result)}
    assert summaries["mitochondria"].objects == summaries["mitochondria"].touching_border == 1
    assert summaries["objects"].total_size == pytest.approx(18 * 0.04 * 0.005**2)
