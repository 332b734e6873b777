"""`affmae measure` as a user types it: the CSV, the summary, scores, units, and refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine.objects import measuring

RUN = CliRunner()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Two balls of 10 voxels radius and one cut by the border, 40 x 10 x 10 nm voxels, as ImageJ TIFF."""
    labels = np.zeros((24, 60, 120), np.uint16)
    grid = np.indices(labels.shape)
    for number, center in enumerate(((12, 30, 20), (12, 30, 60), (12, 30, 119)), 1):
        labels[sum((s * (g - c)) ** 2 for s, g, c in zip((4, 1, 1), grid, center, strict=True)) <= 100] = number
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, labels, imagej=True, resolution=(100, 100), metadata={"axes": "ZYX", "spacing": 0.04,
                     "unit": "um"})  # fmt: skip
    tifffile.imwrite(tmp_path / "classes.tif", (labels > 0).astype(np.uint8))
    tifffile.imwrite(tmp_path / "image.tif", (labels * 50).astype(np.uint8), photometric="minisblack")
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_with_units_classes_and_grey_values(volume: Path) -> None:
    out = volume.with_name("table.csv")
    options = ["--image", str(volume.with_name("image.tif")), "--class-map", str(volume.with_name("classes.tif"))]
    result = RUN.invoke(app, ["measure", str(volume), "-o", str(out), *options, "--unit", "nm"])
    assert result.exit_code == 0, result.output
    table = rows(out)
    assert [row["id"] for row in table] == ["1", "2", "3"]
    assert float(table[0]["volume_nm3"]) == pytest.approx(4 / 3 * np.pi * 100**3, rel=0.04)
    assert float(table[0]["equivalent_diameter_nm"]) == pytest.approx(200, rel=0.02)
    assert float(table[0]["nearest_distance_nm"]) == pytest.approx(400)
    assert [row["mean_gray"] for row in table] == ["50", "100", "150"]
    assert [row["class"] for row in table] == ["1", "1", "1"]
    assert [row["touches_border"] for row in table] == ["0", "0", "1"]


def test_summary_and_scores_as_json(volume: Path) -> None:
    labels = tifffile.imread(volume)
    worse = np.where(labels == 2, 0, labels)
    tifffile.imwrite(volume.with_name("found.tif"), worse.astype(np.uint32), photometric="minisblack")
    out = volume.with_name("table.csv")
    result = RUN.invoke(
        app,
        ["measure", str(volume.with_name("found.tif")), "--truth", str(volume), "-o", str(out), "--json",
         "--pixel-size", "40,10,10"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["scores"]["true_objects"] == 3 and answer["scores"]["predicted_objects"] == 2
    assert answer["scores"]["f1_50"] == pytest.approx(0.8)
    assert answer["classes"][0]["objects"] == 2 and answer["classes"][0]["touching_border"] == 1


def test_small_blocks_give_the_same_table(volume: Path) -> None:
    whole = measuring.measure_volume(volume, image=volume.with_name("image.tif"))
    parts = measuring.measure_volume(volume, image=volume.with_name("image.tif"), block_voxels=5000)
    np.testing.assert_equal(vars(parts.table), vars(whole.table))


def test_unknown_voxel_size_is_measured_in_pixels(volume: Path) -> None:
    plain = volume.with_name("plain.tif")
    tifffile.imwrite(plain, tifffile.imread(volume), photometric="minisblack")
    result = RUN.invoke(app, ["measure", str(plain), "-o", str(volume.with_name("t.csv"))])
    assert result.exit_code == 0
    assert "lengths are in pixels" in result.output
    assert "volume_px3" in rows(volume.with_name("t.csv"))[0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--image", "other.tif"], 3, "same shape"),
        (["--unit", "um", "plain"], 2, "--pixel-size"),
        (["--pixel-size", "4,4", "plain"], 3, "every axis"),
        (["-o", "table.txt"], 2, ".csv"),
        (["--truth", "absent.tif"], 3, "absent.tif"),
    ],
)
def test_refusals(volume: Path, options: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(volume.parent)
    tifffile.imwrite("other.tif", np.zeros((3, 60, 120), np.uint8), photometric="minisblack")
    tifffile.imwrite("plain.tif", tifffile.imread(volume), photometric="minisblack")
    source = "plain.tif" if options[-1] == "plain" else str(volume)
    result = RUN.invoke(app, ["measure", source, *(o for o in options if o != "plain")])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not list(volume.parent.glob("*.csv"))


def test_an_existing_table_is_kept(volume: Path) -> None:
    out = volume.with_name("table.csv")
    out.write_text("mine")
    result = RUN.invoke(app, ["measure", str(volume), "-o", str(out)])
    assert result.exit_code == 2 and out.read_text() == "mine"
    assert RUN.invoke(app, ["measure", str(volume), "-o", str(out), "--overwrite"]).exit_code == 0
    assert len(rows(out)) == 3


def test_ids_of_64_bits_are_kept(tmp_path: Path) -> None:
    labels = np.zeros((1, 8, 8), np.uint64)
    labels[0, :4], labels[0, 6:] = 2**63 + 1, 2**40
    path = tmp_path / "wide.tif"
    tifffile.imwrite(path, labels[0], photometric="minisblack")
    assert RUN.invoke(app, ["measure", str(path), "-o", str(tmp_path / "t.csv")]).exit_code == 0
    assert [row["id"] for row in rows(tmp_path / "t.csv")] == [str(2**40), str(2**63 + 1)]
