"""A volume of 1024 x 1024 x 256 voxels with known objects: segmented, measured and scored within 4 GiB."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from affmae_engine.data.phantom import CLASS_NAMES
from affmae_engine.data.phantom.volumes import write_zarr

SHAPE = (256, 1024, 1024)
PIXEL_NM = (8.0, 8.0, 8.0)
LIMIT = 4 << 30
SMALLEST = 500
"""Voxels: mitochondria that the border of the volume cuts down to less are not counted."""


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "phantom"
    write_zarr(folder, SHAPE, seed=5, pixel_nm=PIXEL_NM)
    return folder


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
    mitochondria, membrane = (str(CLASS_NAMES.index(name)) for name in ("mitochondria", "membrane"))
    found, truth = volume / "found.zarr", volume / "organelles.zarr"
    made = command(
        "objects", volume / "labels.zarr", "--classes", mitochondria, "--boundary-class", membrane, "--volume",
        "--min-size", SMALLEST, "-o", found, "--workers", 1,
    )  # fmt: skip
    scored = command("measure", found, "--truth", truth, "--score-from", SMALLEST, "-o", volume / "found.csv")
    known = command("measure", truth, "--class-map", volume / "labels.zarr", "-o", volume / "truth.csv")
    scores = scored["scores"]
    assert made["counts"][mitochondria] == scores["predicted_objects"]
    # Vesicles are objects of the truth as well, but none of them is as large.
    assert scores["predicted_objects"] == pytest.approx(scores["true_objects"], rel=0.03)
    assert scores["f1_50"] > 0.95 and scores["f1_75"] > 0.95
    assert scores["adapted_rand_error"] < 0.02
    (true,) = (c for c in known["classes"] if c["class_name"] == mitochondria)
    assert scored["classes"][0]["total_size"] == pytest.approx(true["total_size"], rel=0.01)
