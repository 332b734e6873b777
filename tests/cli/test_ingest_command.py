"""`affmae ingest` as a user types it: table, JSON, refusals, exit codes, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine.data.store import Store

RUN = CliRunner()


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 200, shape).astype(np.uint8)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(picture((40, 50), number)).save(folder / f"slice_{number:02}.png")
    tifffile.imwrite(folder / "stack.tif", picture((5, 40, 30), 9), photometric="minisblack")
    return folder


def test_table_and_totals(scans: Path, tmp_path: Path) -> None:
    (scans / "broken.tif").write_bytes(b"II*\0nothing")
    result = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr"), "--pixel-size", "40,4,4"])
    assert result.exit_code == 0, result.output
    assert "slice " in result.stdout and "6×40×50" in result.stdout
    assert "5×40×30" in result.stdout
    assert "40, 4, 4" in result.stdout
    assert "broken.tif" in result.stdout
    assert "2 images taken, 1 skipped" in result.stdout
    assert f"next: affmae pretrain {tmp_path}/em.zarr" in result.stderr
    assert "overview.png" in result.stdout
    assert (tmp_path / "em.zarr" / "affmae" / "overview.png").is_file()
    again = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr")])
    assert again.exit_code == 0
    assert "0 images taken, 2 there already, 1 skipped" in again.stdout


def test_numbered_files_can_stay_apart(scans: Path, tmp_path: Path) -> None:
    result = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr"), "--no-stacks"])
    assert "slice_00 .." in result.stdout and "(6)" in result.stdout and "7 images taken" in result.stdout
    again = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr")])
    assert "0 images taken, 7 there already" in again.stdout


def test_unknown_pixel_size_is_said(scans: Path, tmp_path: Path) -> None:
    result = RUN.invoke(app, ["ingest", str(scans / "stack.tif"), "-o", str(tmp_path / "em.zarr")])
    assert result.stdout.count("--pixel-size") == 1


def test_what_is_no_image_is_said_in_one_line(scans: Path, tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(picture((40, 50), number) // 128).save(scans / f"slice_{number:02}_mask.png")
    result = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr")])
    assert result.exit_code == 0 and "left out  6 label maps (slice_00_mask.png, " in result.stdout
    assert result.stdout.count("--all") == 1
    result = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "all.zarr"), "--all", "--json"])
    assert json.loads(result.stdout)["images"] == 3 and not json.loads(result.stdout)["left_out"]
    y, x = np.mgrid[:96, :96]
    (tmp_path / "labels only").mkdir()
    Image.fromarray((y // 8 % 3 + x // 8 % 2).astype(np.uint8)).save(tmp_path / "labels only" / "a.png")
    result = RUN.invoke(app, ["ingest", str(tmp_path / "labels only"), "-o", str(tmp_path / "none.zarr")])
    assert result.exit_code == 3 and "nothing was taken: left out 1 label map (a.png)" in result.stderr
    assert not (tmp_path / "none.zarr").exists()


def test_cleaning_is_said_and_reversed(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    y, x = np.mgrid[:128, :160]
    for seed, name in enumerate(("one", "two", "three")):
        waves = 120 + 60 * np.sin(y / (7 + seed)) * np.cos(x / (11 - seed)) + picture((128, 160), seed) / 20
        Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "lab" / f"{name}.png")
        if name == "one":
            Image.fromarray((waves * 0.9).astype(np.uint8)).save(tmp_path / "lab" / "paler.png")
    Image.fromarray(np.full((128, 160), 90, np.uint8)).save(tmp_path / "lab" / "empty.png")
    result = RUN.invoke(app, ["ingest", str(tmp_path / "lab"), "-o", str(tmp_path / "em.zarr"), "--clean"])
    assert result.exit_code == 0, result.output
    assert "1 blank left out, 1 near-duplicate left out" in result.stdout and "--no-clean reverses it" in result.stdout
    assert len(Store.open(tmp_path / "em.zarr").images) == 3
    result = RUN.invoke(app, ["ingest", str(tmp_path / "lab"), "-o", str(tmp_path / "em.zarr"), "--no-clean", "--json"])
    report = json.loads(result.stdout)
    assert (report["images"], report["clean"]) == (5, [])


def test_json(scans: Path, tmp_path: Path) -> None:
    result = RUN.invoke(app, ["ingest", str(scans), "-o", str(tmp_path / "em.zarr"), "--json", "-q"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["images"] == 2
    assert report["taken"][0]["shape_ZYX"]
    assert report["taken"][0]["sha256"]
    assert report["skipped"] == []
    assert report["interrupted"] is False


def test_default_place(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RUN.invoke(app, ["ingest", "scans/*.png"]).exit_code == 0
    assert [image.shape_ZYX for image in Store.open(tmp_path / "data" / "em.zarr").images] == [(6, 40, 50)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent"], 3, "no such file or folder: absent"),
        (["nothing*.tif"], 3, "nothing matches"),
        (["text.tif"], 3, "nothing could be taken"),
        (["scans", "--pixel-size", "big"], 2, "40,4,4"),
        (["scans", "--pixel-size", "-1,2,3"], 2, "40,4,4"),
        (["scans", "--channel", "3"], 3, "nothing could be taken"),
        (["scans", "-o", "text.tif/em.zarr"], 4, "cannot"),
        (["scans", "-o", "scans"], 2, "not a dataset"),
        ([], 2, "SOURCE"),
    ],
)
def test_wrong_use(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "text.tif").write_text("no image")
    monkeypatch.chdir(tmp_path)
    result = RUN.invoke(app, ["ingest", *arguments])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_interrupted_by_a_signal_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        tifffile.imwrite(
            folder / f"{number}.tif", np.full((12, 1500, 1500), number, np.uint8), photometric="minisblack"
        )
    command = [
        sys.executable,
        "-m",
        "affmae_cli",
        "ingest",
        str(folder),
        "-o",
        str(tmp_path / "em.zarr"),
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 60
    while not list((tmp_path / "em.zarr").glob("images/*/0/c/*/*/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(Store.open(tmp_path / "em.zarr").images) == 4
