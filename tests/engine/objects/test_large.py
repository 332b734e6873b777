"""A volume of 1024 x 1024 x 256 voxels with known objects: segmented, measured and scored within 4 GiB."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from affmae_engine.data.phantom import CLASS_NAMES
from affmae_engine.data.phantom.volumes import write_zarr
from affmae_engine.data.store_layout import image_attributes

SHAPE = (256, 1024, 1024)
PIXEL_NM = (8.0, 8.0, 8.0)
LIMIT = 4 << 30
MEMBRANE, MITOCHONDRIA = CLASS_NAMES.index("membrane"), CLASS_NAMES.index("mitochondria")
SMALLEST = 500
"""Voxels: mitochondria that the border of the volume cuts down to less are not counted."""


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "phantom"
    write_zarr(folder, SHAPE, seed=5, pixel_nm=PIXEL_NM)
    write_truth(folder)
    return folder


def write_truth(folder: Path) -> None:
    """The ids of mitochondria, without those of vesicles, as FOLDER/mitochondria.zarr."""
    ids, classes = (zarr.open_array(folder / f"{name}.zarr" / "0", mode="r") for name in ("organelles", "labels"))
    group = zarr.create_group(folder / "mitochondria.zarr", attributes=image_attributes("mitochondria", PIXEL_NM))
    truth = group.create_array("0", shape=ids.shape, chunks=ids.chunks, dtype="u4", dimension_names=("z", "y", "x"))
    for z in range(0, SHAPE[0], ids.chunks[0]):
        layer = slice(z, z + ids.chunks[0])
        truth[layer] = np.where(classes[layer] == MITOCHONDRIA, ids[layer], 0)


def command(*arguments: object) -> Any:
    """Run a command in a process of its own; its JSON output. Its memory must stay within the limit."""
    done = subprocess.run(
        [sys.executable, "-m", "affmae_cli", *map(str, arguments), "--json", "-q"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    # The largest of all processes that this one has waited for, KiB.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < LIMIT
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_mitochondria_of_a_large_phantom(volume: Path) -> None:
    found, truth = volume / "found.zarr", volume / "mitochondria.zarr"
    made = command(
        "objects", volume / "labels.zarr", "--classes", MITOCHONDRIA, "--boundary-class", MEMBRANE, "--volume",
        "--min-size", SMALLEST, "-o", found, "--workers", 1,
    )  # fmt: skip
    scored = command("measure", found, "--truth", truth, "--score-from", SMALLEST, "-o", volume / "found.csv")
    known = command("measure", truth, "-o", volume / "truth.csv")
    scores = scored["scores"]
    assert made["counts"][str(MITOCHONDRIA)] == scores["predicted_objects"]
    # A mitochondrion in two parts, cut by the wall of its cell, is one object in the truth.
    assert scores["predicted_objects"] == pytest.approx(scores["true_objects"], rel=0.1)
    assert scores["f1_50"] > 0.95 and scores["f1_75"] > 0.94
    assert scores["adapted_rand_error"] < 0.01
    assert scored["classes"][0]["total_size"] == pytest.approx(known["classes"][0]["total_size"], rel=0.01)
