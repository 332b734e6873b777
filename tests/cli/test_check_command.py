"""`affmae check`: whole things pass, damage is named and exits with 6, and nothing is changed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine import checkpoint
from affmae_engine.config import RunConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.predict.grid import Grid
from affmae_engine.predict.tiff_labels import OutputInfo, write_tiff
from affmae_engine.predict.volume import Pyramid, image_attributes, labels_attributes
from affmae_engine.run_dir import create
from affmae_engine.weights import WeightsMetadata

LABELS = np.random.default_rng(0).integers(0, 3, (3, 50, 40)).astype(np.uint8)


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def dataset(root: Path) -> Path:
    for name in "ab":
        tifffile.imwrite(root / f"{name}.tif", LABELS, photometric="minisblack")
    tifffile.imwrite(root / "b.tif", LABELS[:2], photometric="minisblack")
    ingest([root / "a.tif", root / "b.tif"], root / "em.zarr")
    return root / "em.zarr"


def run(root: Path) -> Path:
    made = create(root / "run")
    made.write_config(RunConfig(), "pretrain")
    for step in (1, 2):
        about = WeightsMetadata(task="pretrain", step=step, model={}, image_size=8, normalisation={})
        checkpoint.save(made, weights={}, optimizer={}, state={}, metadata=about)
    return made.root


def tiff(root: Path) -> Path:
    about = OutputInfo("a", (3, 50, 40), LABELS.dtype, (None, 4.0, 4.0), ("x", "y", "z"), {"fingerprint": "0" * 64})
    write_tiff(root / "a.tif", about, LABELS)
    return root / "a.tif"


def flat_volume(root: Path) -> Path:
    """As version 0.1.0 wrote labels: one array at the root."""
    pyramid = Pyramid(root / "a.zarr", Grid((3, 50, 40), (3, 50, 40)), LABELS.dtype)
    pyramid.create(labels_attributes("a", (None, None, None), 1, ("x", "y", "z"), {}))
    pyramid.write(pyramid.grid[0], LABELS)
    return root / "a.zarr"


def volume(root: Path) -> Path:
    """As it is written now: the image at the root, labels below it."""
    grid = Grid((3, 50, 40), (3, 50, 40))
    image, labels = (Pyramid(folder, grid, LABELS.dtype) for folder in (root / "b.zarr", root / "b.zarr/labels/b"))
    image.create(image_attributes("b", (None, None, None), 1, (0.0, 2.0), {}))
    labels.create(labels_attributes("b", (None, None, None), 1, ("x", "y", "z"), {}))
    attributes = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", "labels": ["b"]}}}
    (root / "b.zarr" / "labels" / "zarr.json").write_text(json.dumps(attributes))
    for pyramid in (image, labels):
        pyramid.write(grid[0], LABELS)
    return root / "b.zarr"


def folder(root: Path) -> Path:
    """A folder of predictions, with others' files between them."""
    (root / "all" / "deep").mkdir(parents=True)
    tiff(root / "all")
    volume(root / "all" / "deep")
    tifffile.imwrite(root / "all" / "foreign.tif", LABELS, photometric="minisblack")
    return root / "all"


def damage(file: Path) -> None:
    """Flip a bit in the middle; of a TIFF, in the middle of its first strip."""
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if file.suffix == ".tif":
        with tifffile.TiffFile(file) as opened:
            page = opened.pages.first
            middle = page.dataoffsets[0] + page.databytecounts[0] // 2
    data[middle] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "kind", "victim"),
    [(dataset, "dataset", "images/a/0/c/0/0/0"), (run, "run", "checkpoints/step-000002/state.json"),
     (run, "run", "checkpoints/step-000001/weights.safetensors"), (tiff, "prediction", ""),
     (flat_volume, "prediction", "0/c/0/0/0"), (volume, "prediction", "0/c/0/0/0"),
     (volume, "prediction", "labels/b/0/c/0/0/0"), (folder, "prediction", "a.tif"),
     (folder, "prediction", "deep/b.zarr/labels/b/0/c/0/0/0")],
)  # fmt: skip
def test_whole_then_damaged(tmp_path: Path, make: Any, kind: str, victim: str) -> None:
    path = make(tmp_path)
    good = check(path, "--json")
    assert good.exit_code == 0, good.output
    (found,) = json.loads(good.stdout)
    assert found["kind"] == kind and found["checked"] >= 1 and not found["problems"]
    before = set(tmp_path.rglob("*"))
    damage(path / victim if victim else path)
    bad = check(path)
    assert bad.exit_code == 6 and "Traceback" not in bad.output
    assert f"({kind})" in bad.stdout and "1 damaged" in bad.stdout
    assert set(tmp_path.rglob("*")) == before


def test_a_missing_chunk_is_not_background(tmp_path: Path) -> None:
    path = volume(tmp_path)
    (path / "labels" / "b" / "0" / "c" / "0" / "0" / "0").unlink()
    result = check(path)
    assert result.exit_code == 6 and "is missing" in result.stdout


def test_an_unfinished_prediction_in_a_folder_is_told(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert check(path).exit_code == 0
    (path / "deep" / ".c.tif.unfinished").mkdir()
    result = check(path)
    assert result.exit_code == 6 and ".c.tif.unfinished is an unfinished prediction" in result.stdout


def test_unfinished_and_foreign_things(tmp_path: Path) -> None:
    (tmp_path / ".out.tif.unfinished").mkdir()
    unfinished = check(tmp_path / "out.tif")
    assert unfinished.exit_code == 6 and "unfinished" in unfinished.stdout
    tifffile.imwrite(tmp_path / "foreign.tif", LABELS, photometric="minisblack")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, text in (
        ("foreign.tif", "was not written by"), ("pipe", "was not written by"), ("folder", "is neither"),
        ("absent", "no such"),
    ):  # fmt: skip
        result = check(tmp_path / name)
        assert result.exit_code == 3 and text in " ".join(result.stderr.split())
    several = check(dataset(tmp_path), tiff(tmp_path), "-q")
    assert several.exit_code == 0 and several.stdout.count("whole") == 2 and not several.stderr


def test_a_prediction_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    whole = tiff(tmp_path).read_bytes()
    cut = [tmp_path / f"{percent}.tif" for percent in (90, 50, 2, 0)]
    for path in cut:
        path.write_bytes(whole[: len(whole) * int(path.stem) // 100])
    command = [sys.executable, "-m", "affmae_cli", "check", *cut]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 6
    said = result.stdout + result.stderr
    assert "written by" not in said and "origin" not in said
    assert all(f"cannot read {path}: " in said for path in cut)
    kinds = ("reading ", "error: ", "hint: ", f"{tmp_path}/", "  cannot read ")
    assert all(line.startswith(kinds) for line in said.splitlines()), said  # no word of a library's own
    assert all(check(path).exit_code == 6 for path in cut)


def test_one_bad_path_does_not_keep_the_others_from_being_checked(tmp_path: Path) -> None:
    good = tiff(tmp_path)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size * 9 // 10])
    (tmp_path / "torn.zarr").mkdir()
    (tmp_path / "torn.zarr" / "zarr.json").write_text('{"attributes": {"affmae_prediction": {}}}')
    absent = check(tmp_path / "absent", good)
    assert absent.exit_code == 3 and "no such" in absent.stderr and f"{good} (prediction)" in absent.stdout
    result = check(tmp_path / "torn.zarr", cut, tmp_path / "absent", good)
    assert result.exit_code == 6 and "its array is damaged" in result.stderr and "no such" in result.stderr
    assert f"damaged: {cut}" in result.stderr and f"{good} (prediction): 3 parts read, whole" in result.stdout
    worst = check(tmp_path / "torn.zarr", tmp_path / "absent", "--json")
    assert worst.exit_code == 6
    assert [found["kind"] for found in json.loads(worst.stdout)] == [None, None]
    assert all(len(found["problems"]) == 1 for found in json.loads(worst.stdout))


@pytest.mark.usefixtures("permissions_count")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = tiff(tmp_path)
    path.chmod(0)
    result = check(path)
    assert result.exit_code == 3 and "permission was denied" in result.stderr
