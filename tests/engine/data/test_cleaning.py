"""`ingest --clean`: what is found, what is not, and that every decision can be reversed."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage

from affmae_engine.data.cleaning import info_bar
from affmae_engine.data.ingest import ingest
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import StorePaths


def micrograph(seed: int, shape: tuple[int, int] = (256, 320)) -> np.ndarray:
    """Smooth structure with noise."""
    rng = np.random.default_rng(seed)
    structure = ndimage.gaussian_filter(rng.normal(0, 1, shape), 6)
    return (120 + 400 * structure + rng.normal(0, 10, shape)).clip(5, 250).astype(np.uint8)


def with_bar(section: np.ndarray, height: int = 24, background: int = 0) -> np.ndarray:
    picture = Image.fromarray(section.copy())
    draw = ImageDraw.Draw(picture)
    top = section.shape[0] - height
    draw.rectangle((0, top, section.shape[1], section.shape[0]), fill=background)
    draw.text((10, top + 5), "HV 5.00 kV   mag 20 000 x   WD 4.1 mm   500 nm", fill=255 - background)
    return np.asarray(picture)


def save(folder: Path, **images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack")


@pytest.mark.parametrize("background", [0, 255, 40])
@pytest.mark.parametrize("height", [16, 48])
def test_the_info_bar_is_found_to_the_row(background: int, height: int) -> None:
    assert info_bar(with_bar(micrograph(0), height, background)) == 256 - height


def test_what_is_no_info_bar_stays() -> None:
    padded = micrograph(1)
    padded[-30:] = 0
    dark = micrograph(2)
    dark[-40:] = (dark[-40:] * 0.2).astype(np.uint8)
    for section in (micrograph(0), padded, dark, np.full((256, 320), 7, np.uint8)):
        assert info_bar(section) is None


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Three good images, and one of each kind to be cleaned."""
    brighter = (micrograph(0).astype(int) * 0.9 + 20).astype(np.uint8)
    white = micrograph(5)
    white[:, :200] = 255
    white[::3, ::3] = micrograph(5)[::3, ::3]  # not a region of padding
    noise = np.random.default_rng(6).integers(90, 110, (256, 320), dtype=np.uint8)
    save(tmp_path / "lab", good=micrograph(0), other=micrograph(1, (300, 320)), third=micrograph(2, (280, 320)))
    save(tmp_path / "lab", copied=brighter, white=white, resin=noise, bar=with_bar(micrograph(7, (250, 330))))
    return tmp_path / "lab"


def test_cleaning_decides_and_is_reversed(lab: Path, tmp_path: Path) -> None:
    store, shown = tmp_path / "em.zarr", []

    def confirm(cleaned: object, sheet: Path) -> bool:
        with Image.open(sheet) as picture:
            shown.append(picture.size)
        return True

    report = ingest([lab], store, clean=True, confirm=confirm)
    decided = {Path(decision.path).stem: decision.what for decision in report.decisions}
    assert decided == {
        "good": "near-duplicate", "white": "saturated", "resin": "blank", "bar": "info bar"
    } or decided == {"copied": "near-duplicate", "white": "saturated", "resin": "blank", "bar": "info bar"}  # fmt: skip
    kept = {image.name: image.shape_ZYX for image in report.taken}
    assert len(kept) == 4 and kept["bar"] == (1, 226, 330) and len(shown) == 1
    manifest = json.loads(StorePaths(store).manifest.read_text())
    assert {entry["what"] for entry in manifest["clean"]} == set(decided.values())
    again = ingest([lab], store)  # keeps to what was decided
    assert not again.taken and again.images == 4 and len(again.decisions) == 4
    everything = ingest([lab], store, clean=False)
    assert everything.images == 7 and not everything.decisions
    assert Store.open(store)["bar"].shape_ZYX == (1, 250, 330)
    assert json.loads(StorePaths(store).manifest.read_text())["clean"] == []
    assert ingest([lab], store, clean=True).images == 4  # also of what is in the dataset already


def test_nothing_is_done_without_consent(lab: Path, tmp_path: Path) -> None:
    report = ingest([lab], tmp_path / "em.zarr", clean=True, confirm=lambda cleaned, sheet: False)
    assert report.images == 7 and not report.decisions


def test_the_info_bars_of_a_stack_of_files_are_cropped(tmp_path: Path) -> None:
    sections = [micrograph(k) for k in range(4)]
    save(tmp_path / "in", **{f"z{k}": with_bar(section) for k, section in enumerate(sections)})
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr", clean=True)
    (image,) = report.taken
    block = Store.open(tmp_path / "em.zarr").read(image.name, *[slice(None)] * 3)
    np.testing.assert_array_equal(block, np.stack(sections)[:, :232])
    assert "info bar of 24 rows cropped" in image.notes
