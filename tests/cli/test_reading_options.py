"""`--axes` and `--channel` of `ingest` and `finetune` (those of `predict` are tested with it)."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine.data.store import Store

ALL = slice(None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def affmae(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_ingest_asks_about_narrow_sections_and_takes_the_answer(here: Path) -> None:
    block = np.random.default_rng(0).integers(0, 255, (60, 50, 12), np.uint8)
    tifffile.imwrite(here / "a.tif", block, metadata=None, photometric="minisblack")
    asked = affmae("ingest", "a.tif", "-o", "em.zarr")
    assert asked.exit_code == 0 and "--axes YXZ" in " ".join(asked.output.split())
    told = affmae("ingest", "a.tif", "-o", "em.zarr", "--axes", "yxz", "--json")
    (taken,) = json.loads(told.stdout)["taken"]
    assert taken["shape_ZYX"] == [12, 60, 50]  # it is another image than the one without
    np.testing.assert_array_equal(
        Store.open(here / "em.zarr").read(taken["name"], ALL, ALL, ALL), np.moveaxis(block, -1, 0)
    )
    for wrong, code in (("yx", 3), ("yxq", 2), ("zyxy", 2)):
        assert affmae("ingest", "a.tif", "-o", "other.zarr", "--axes", wrong).exit_code == code


def test_ingest_takes_one_channel(here: Path) -> None:
    block = np.random.default_rng(0).integers(0, 255, (3, 2, 40, 50), np.uint8)
    tifffile.imwrite(here / "a.tif", block, imagej=True, metadata={"axes": "ZCYX"})
    assert affmae("ingest", "a.tif", "-o", "em.zarr", "--channel", "1").exit_code == 0
    np.testing.assert_array_equal(Store.open(here / "em.zarr").read("a", ALL, ALL, ALL), block[:, 1])
    assert affmae("ingest", "a.tif", "-o", "other.zarr", "--channel", "2").exit_code == 3


def two_channels(folder: Path) -> np.ndarray:
    """image.tif of two channels and labels.tif; the image's values [Z, C, Y, X]."""
    block = np.random.default_rng(0).integers(0, 255, (4, 2, 64, 64), np.uint8)
    tifffile.imwrite(folder / "image.tif", block, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(folder / "labels.tif", (block[:, 0] > 99).astype(np.uint8), imagej=True, metadata={"axes": "ZYX"})
    return block


FINETUNE = ["finetune", "--images", "image.tif", "--labels", "labels.tif", "--preset", "demo"]


def test_finetune_knows_the_options(here: Path) -> None:
    two_channels(here)
    for options, code in ((("--channel", "1"), 0), (("--channel", "2"), 3), (("--axes", "zc"), 2)):
        result = affmae(*FINETUNE, "--dry-run", *options)
        assert result.exit_code == code, result.output


@pytest.mark.slow
def test_finetune_trains_on_one_channel(here: Path) -> None:
    block = two_channels(here)
    small = ["--set", "data.crop_size=64", "--set", "train.batch_size=8", "--device", "cpu", "--steps", "1", "--no-tui"]
    result = affmae(*FINETUNE, *small, "--channel", "1", "-o", "run", "-q")
    assert result.exit_code == 0, result.output
    store = Store.open(here / "run" / "data.zarr")
    np.testing.assert_array_equal(store.read("image", ALL, ALL, ALL), block[:, 1])
