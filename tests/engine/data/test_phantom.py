"""The synthetic EM phantom: reproducible, complete, to scale, and shaped like serial sections."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from affmae_engine.data import phantom as phantom_package
from affmae_engine.data.phantom import CLASS_NAMES, Phantom, generate, write_tiff
from affmae_engine.data.phantom.__main__ import main
from affmae_engine.data.phantom.noise import SplineNoise, grain
from affmae_engine.data.phantom.render import shell
from affmae_engine.data.phantom.volumes import VOLUMES, write_zarr
from affmae_engine.data.readers import open_sources
from affmae_engine.errors import ConfigError, ResourceError

MEMBRANE, MITOCHONDRIA = CLASS_NAMES.index("membrane"), CLASS_NAMES.index("mitochondria")


@pytest.fixture(scope="module")
def block() -> Phantom:
    """Ten sections of 1.5 x 1.5 um, enough for every class."""
    return generate((10, 256, 256), seed=3)


def section_correlation(phantom: Phantom, apart: int) -> float:
    volume = phantom.image_ZYX.astype(float)
    pairs = [np.corrcoef(volume[z].ravel(), volume[z + apart].ravel())[0, 1] for z in range(len(volume) - apart)]
    return float(np.mean(pairs))


def test_shapes_types_and_classes(block: Phantom) -> None:
    assert block.image_ZYX.shape == block.labels_ZYX.shape == block.instances_ZYX.shape == (10, 256, 256)
    assert (block.image_ZYX.dtype, block.labels_ZYX.dtype, block.instances_ZYX.dtype) == (np.uint8, np.uint8, np.uint32)
    share = np.bincount(block.labels_ZYX.ravel(), minlength=len(CLASS_NAMES)) / block.labels_ZYX.size
    assert len(share) == len(CLASS_NAMES)
    assert share.min() > 1e-3
    assert 0.08 < share[MEMBRANE] < 0.3
    assert share.argmax() == 0


def test_same_seed_gives_the_same_bits_and_another_seed_other_tissue() -> None:
    first, again, other = (generate((2, 64, 80), seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image_ZYX, again.image_ZYX)
    np.testing.assert_array_equal(first.labels_ZYX, again.labels_ZYX)
    np.testing.assert_array_equal(first.instances_ZYX, again.instances_ZYX)
    assert (first.labels_ZYX != other.labels_ZYX).mean() > 0.1


@pytest.mark.parametrize("shape", [(1, 96, 130), (1, 1, 1), (3, 1, 37), (2, 61, 1)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    phantom = generate(shape, seed=1)
    assert phantom.image_ZYX.shape == phantom.labels_ZYX.shape == shape
    assert phantom.labels_ZYX.max() < len(CLASS_NAMES)


def test_noise_and_drift_change_the_image_but_not_the_tissue() -> None:
    noisy, clean = (generate((2, 90, 90), seed=2, noise=noise, drift=0) for noise in (0.2, 0.0))
    np.testing.assert_array_equal(noisy.labels_ZYX, clean.labels_ZYX)
    roughness = [np.abs(np.diff(p.image_ZYX.astype(float), axis=2)).mean() for p in (noisy, clean)]
    assert roughness[0] > 1.2 * roughness[1]


def test_brightness_drifts_between_sections() -> None:
    steady, drifting = (generate((10, 64, 64), seed=4, drift=drift) for drift in (0.0, 0.1))
    change = drifting.image_ZYX.mean((1, 2)) - steady.image_ZYX.mean((1, 2))
    assert change.std() > 8
    np.testing.assert_array_equal(steady.labels_ZYX, drifting.labels_ZYX)


def test_neighbouring_sections_are_alike_and_less_so_the_thicker_they_are(block: Phantom) -> None:
    near, far = section_correlation(block, 1), section_correlation(block, 8)
    assert near > 0.25
    assert near > far + 0.2
    thin = generate((4, 160, 160), seed=3, pixel_nm=(10.0, 6.0, 6.0))
    thick = generate((4, 160, 160), seed=3, pixel_nm=(80.0, 6.0, 6.0))
    assert section_correlation(thin, 1) > section_correlation(thick, 1) + 0.15


def test_membranes_are_dark_and_no_threshold_finds_them(block: Phantom) -> None:
    image, membrane = block.image_ZYX.astype(float), block.labels_ZYX == MEMBRANE
    assert image[membrane].mean() + 50 < image[block.labels_ZYX == 0].mean()
    overlap = [(membrane & (image < level)).sum() / (membrane | (image < level)).sum() for level in range(20, 200, 10)]
    assert 0.3 < max(overlap) < 0.8


def test_instances_are_apart_wherever_membranes_run(block: Phantom) -> None:
    cell = block.instances_ZYX
    np.testing.assert_array_equal(cell == 0, block.labels_ZYX == MEMBRANE)
    for left, right in ((cell[:, :, :-1], cell[:, :, 1:]), (cell[:, :-1], cell[:, 1:])):
        touching = (left != right) & (left > 0) & (right > 0)
        assert touching.mean() < 1e-4
    assert len(np.unique(cell)) > 30


def test_mitochondria_lie_within_one_cell_each_at_a_distance_from_the_membrane(block: Phantom) -> None:
    mito = block.labels_ZYX == MITOCHONDRIA
    membrane = block.labels_ZYX == MEMBRANE
    for axis in (1, 2):
        ahead = np.roll(membrane, 1, axis) & mito
        assert ahead.sum() < 0.002 * mito.sum()


def test_organelle_ids_cover_mitochondria_and_vesicles_and_stay_in_one_cell(block: Phantom) -> None:
    ids, classes = block.organelles_ZYX, block.labels_ZYX
    np.testing.assert_array_equal(ids > 0, (classes == MITOCHONDRIA) | (classes == CLASS_NAMES.index("vesicle")))
    mitochondria, vesicles = np.unique(ids[classes == MITOCHONDRIA]), np.unique(ids[classes == 3])
    assert len(mitochondria) > 1 and len(vesicles) > 10
    assert mitochondria.max() < vesicles.min()
    for one in mitochondria:
        assert len(np.unique(block.instances_ZYX[ids == one])) == 1


def test_section_wise_volumes_equal_the_phantom_in_memory(tmp_path: Path) -> None:
    shape, nm = (18, 40, 300), (20.0, 8.0, 8.0)
    whole = generate(shape, seed=4, pixel_nm=nm)
    write_zarr(tmp_path / "phantom", shape, seed=4, pixel_nm=nm)
    for name in VOLUMES:
        (source,) = open_sources(tmp_path / "phantom" / f"{name}.zarr", labels=name != "image")
        assert source.info.pixel_nm == nm
        np.testing.assert_array_equal(source.read(slice(None), slice(None), slice(None)), getattr(whole, f"{name}_ZYX"))
    with pytest.raises(FileExistsError):
        write_zarr(tmp_path / "phantom", shape, seed=4)


def test_geometry_is_in_nanometres() -> None:
    fine = generate((1, 240, 240), seed=8, pixel_nm=(40.0, 5.0, 5.0))
    coarse = generate((1, 120, 120), seed=8, pixel_nm=(40.0, 10.0, 10.0))
    shares = [np.bincount(p.labels_ZYX.ravel(), minlength=5) / p.labels_ZYX.size for p in (fine, coarse)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.06)
    agreement = (fine.labels_ZYX[:, ::2, ::2] == coarse.labels_ZYX).mean()
    assert agreement > 0.8  # the same tissue, not only the same kind


def test_tiff_keeps_pixels_and_voxel_size(tmp_path: Path) -> None:
    phantom = generate((3, 40, 52), seed=9, pixel_nm=(45.0, 8.0, 6.0))
    image_path, label_path = tmp_path / "em.tif", tmp_path / "labels.tif"
    write_tiff(phantom, image_path, label_path)
    for path, expected in ((image_path, phantom.image_ZYX), (label_path, phantom.labels_ZYX)):
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_imagej
            assert len(tiff.pages) == 3
            assert tiff.series[0].axes == "ZYX"
            np.testing.assert_array_equal(tiff.asarray(), expected)
            metadata = tiff.imagej_metadata
            assert metadata is not None
            assert metadata["spacing"] == pytest.approx(0.045)
            assert metadata["unit"] in ("um", "micron", "\\u00B5m")
            for tag, size_nm in (("XResolution", 6.0), ("YResolution", 8.0)):
                pixels, micrometres = tiff.pages[0].tags[tag].value
                assert 1000 * micrometres / pixels == pytest.approx(size_nm, rel=1e-4)


def test_single_section_tiff(tmp_path: Path) -> None:
    phantom = generate((1, 20, 30), seed=9)
    write_tiff(phantom, tmp_path / "a.tif", tmp_path / "b.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), phantom.image_ZYX[0])


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phantom = generate((1, 20, 30), seed=9)

    def fill_disk(path: Path, *args: object, **options: object) -> None:
        path.write_bytes(b"II*")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", fill_disk)
    with pytest.raises(ResourceError, match="full"):
        write_tiff(phantom, tmp_path / "a.tif", tmp_path / "b.tif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "options", "named"),
    [
        ((0, 64, 64), {}, "shape"),
        ((1, 64, -3), {}, "shape"),
        ((64, 64), {}, "shape"),
        ((1, 64.5, 64), {}, "shape"),
        ((1, 64, 64), {"pixel_nm": (40.0, -6.0, 6.0)}, "voxel size"),
        ((1, 64, 64), {"pixel_nm": (40.0, 0.0, 6.0)}, "voxel size"),
        ((1, 64, 64), {"pixel_nm": (float("nan"), 6.0, 6.0)}, "voxel size"),
        ((1, 64, 64), {"seed": -1}, "seed"),
        ((1, 64, 64), {"noise": -0.1}, "noise"),
        ((1, 64, 64), {"drift": 2.0}, "drift"),
    ],
)
def test_bad_arguments_are_named(shape: tuple, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(shape, **{"seed": 0, **options})


def test_command_writes_tiffs_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, labels, picture = (tmp_path / "new" / name for name in ("em.tif", "labels.tif", "look.png"))
    files = ["--image", str(image), "--labels", str(labels), "--picture", str(picture)]
    assert main(["--shape", "2", "48", "40", "--seed", "3", *files]) == 0
    np.testing.assert_array_equal(tifffile.imread(image), generate((2, 48, 40), seed=3).image_ZYX)
    with Image.open(picture) as opened:
        assert opened.size == (2 * 40 + 6, 48)
    assert main(["--shape", "0", "48", "40", *files]) == ConfigError.exit_code
    assert "shape" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--image", str(image)])


def test_field_is_the_same_on_a_grid_and_at_points_and_has_unit_variance() -> None:
    low, high = np.zeros(3), np.array([2000.0, 2000.0, 2000.0])
    field = SplineNoise(np.random.default_rng(0), low, high, 100.0, 2)
    y_nm, x_nm = np.arange(0, 2000, 40.0), np.arange(0, 2000, 50.0)
    grid_CYX = field.grid(730.0, y_nm, x_nm)
    point_N3 = np.stack(np.meshgrid([730.0], y_nm, x_nm, indexing="ij"), -1).reshape(-1, 3)
    np.testing.assert_allclose(field.at(point_N3).reshape(grid_CYX.shape), grid_CYX, atol=1e-5)
    assert field.at(np.random.default_rng(1).uniform(0, 2000, (4000, 3))).std() == pytest.approx(1, abs=0.1)
    assert grain(np.random.default_rng(2), (300, 300), (6.0, 6.0), 15.0).std() == pytest.approx(1, abs=0.08)


def test_section_average_of_a_shell_is_exact() -> None:
    distance = np.linspace(-60, 60, 25, dtype=np.float32)
    steps = np.linspace(-0.5, 0.5, 20001)
    sampled = [np.mean((d + 30 * steps > 5) & (d + 30 * steps < 13)) for d in distance]
    np.testing.assert_allclose(shell(distance, 30.0, 5.0, 13.0), sampled, atol=1e-3)


def test_package_names_its_classes() -> None:
    assert CLASS_NAMES[0] == "cytoplasm"
    assert {"membrane", "mitochondria"} <= set(CLASS_NAMES)
    assert set(phantom_package.__all__) >= {"CLASS_NAMES", "Phantom", "generate", "write_tiff"}
