"""`affmae objects` as a user types it: outputs, restarts, shards, tuning, and refusals."""

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
import yaozarrs
import zarr
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine.objects.make import intermediate_folder
from affmae_engine.objects.scores import score_objects
from affmae_engine.objects.targets import DISTANCE_CAP, channel_names, instance_targets
from affmae_engine.objects.write import object_color

RUN = CliRunner()


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Touching cells of 20 nm voxels with a membrane between them, as a class map, with image and true objects."""
    rng = np.random.default_rng(4)
    shape = (40, 60, 70)
    centers = rng.uniform(0, 1, (14, 3)) * shape
    grid = np.stack(np.indices(shape), -1).astype(np.float32)
    distance = np.sqrt(((grid[..., None, :] - centers) ** 2).sum(-1))
    order = np.sort(distance, axis=-1)
    membrane = order[..., 1] - order[..., 0] < 1.6
    true = np.where(membrane, 0, distance.argmin(-1) + 1).astype(np.uint16)
    leaky = np.where(membrane & (rng.random(shape) > 0.08), 1, 2).astype(np.uint8)
    voxel = {"imagej": True, "resolution": (50, 50), "metadata": {"axes": "ZYX", "spacing": 0.02, "unit": "um"}}
    path = tmp_path / "classes.tif"
    tifffile.imwrite(path, leaky, **voxel)
    tifffile.imwrite(tmp_path / "true.tif", true, **voxel)
    tifffile.imwrite(tmp_path / "image.tif", (200 - 100 * membrane).astype(np.uint8), **voxel)
    return path


def call(*arguments: object, code: int = 0) -> str:
    result = RUN.invoke(app, ["objects", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def options(cells: Path, out: str) -> list[object]:
    return [cells, "--classes", "2", "--boundary-class", "1", "-o", cells.with_name(out), "--workers", "1",
            "--block", "20,32,32", "--set", "seed_distance=3"]  # fmt: skip


def voxels(path: Path) -> np.ndarray:
    return zarr.open_array(path / "0", mode="r")[:] if path.suffix == ".zarr" else tifffile.imread(path)


def test_zarr_and_tiff_hold_the_same_objects_with_scale(cells: Path) -> None:
    said = call(*options(cells, "a.zarr"), "--image", cells.with_name("image.tif"))
    call(*options(cells, "a.tif"))
    first, second = voxels(cells.with_name("a.zarr")), voxels(cells.with_name("a.tif"))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == second.dtype == np.uint32
    assert f"{first.max()} 2" in said
    assert 10 <= first.max() <= 25
    yaozarrs.validate_zarr_store(str(cells.with_name("a.zarr")))
    ome = json.loads((cells.with_name("a.zarr") / "zarr.json").read_text())["attributes"]["ome"]
    assert ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] == pytest.approx([20] * 3)
    colors = {c["label-value"]: tuple(c["rgba"]) for c in ome["image-label"]["colors"]}
    assert colors[3] == (*object_color(3), 255) and len(set(colors.values())) == len(colors)
    with tifffile.TiffFile(cells.with_name("a.tif")) as file:
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [pixels[f"PhysicalSize{a}"] for a in "ZYX"] == pytest.approx([20] * 3)
        assert pixels["Type"] == "uint32"
    with Image.open(cells.with_name("a-overlay.png")) as picture:
        assert picture.size == (3 * 70, 2 * 60)
    assert not intermediate_folder(cells.with_name("a.zarr")).exists()


def test_objects_can_be_measured_with_their_class(cells: Path) -> None:
    call(*options(cells, "a.tif"))
    out = cells.with_name("table.csv")
    result = RUN.invoke(
        app, ["measure", str(cells.with_name("a.tif")), "--truth", str(cells.with_name("true.tif")), "-o", str(out),
              "--json"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["classes"][0]["class_name"] == "2"
    assert answer["scores"]["adapted_rand_error"] < 0.1
    assert answer["scores"]["f1_50"] > 0.8
    assert "volume_nm3" in out.read_text().splitlines()[0]


def test_shards_give_the_same_bits(cells: Path) -> None:
    call(*options(cells, "one.zarr"))
    command = [sys.executable, "-m", "affmae_cli", "objects", *map(str, options(cells, "two.zarr")), "-q"]
    other = subprocess.Popen([*command, "--shard", "2/2"])
    call(*options(cells, "two.zarr"), "--shard", "1/2")
    assert other.wait(timeout=120) == 0
    np.testing.assert_array_equal(voxels(cells.with_name("two.zarr")), voxels(cells.with_name("one.zarr")))


@pytest.mark.slow
def test_several_processes_give_the_same_bits(cells: Path) -> None:
    call(*options(cells, "one.zarr"))
    call(*options(cells, "two.zarr"), "--workers", 2)
    np.testing.assert_array_equal(voxels(cells.with_name("two.zarr")), voxels(cells.with_name("one.zarr")))


@pytest.mark.slow
def test_a_killed_run_is_continued_with_the_same_bits(cells: Path) -> None:
    call(*options(cells, "one.zarr"))
    command = [sys.executable, "-m", "affmae_cli", "objects", *map(str, options(cells, "two.zarr")), "-q"]
    folder = intermediate_folder(cells.with_name("two.zarr"))
    for wanted in ("seeds/000003.npz", "flood/000005.npz", "holes/000002.npz"):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 100
        while not (folder / wanted).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        if process.returncode == 0:  # it was faster than the signal
            break
        assert not cells.with_name("two.zarr").exists()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("seeds/*.npz")}
    if folder.exists():
        assert kept
        call(*options(cells, "two.zarr"))
    np.testing.assert_array_equal(voxels(cells.with_name("two.zarr")), voxels(cells.with_name("one.zarr")))


def test_a_stopped_run_says_how_to_continue_and_computes_nothing_twice(
    cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from affmae_engine.objects.decode import Flood

    compute = Flood.__call__
    computed: list[int] = []

    def counted(self: Flood, block: object) -> dict[str, np.ndarray]:
        computed.append(block.index)  # type: ignore[attr-defined]
        if len(computed) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, block)  # type: ignore[arg-type]

    monkeypatch.setattr(Flood, "__call__", counted)
    said = call(*options(cells, "a.zarr"), code=143)
    assert "run the same command again" in said
    call(*options(cells, "a.zarr"))
    assert sorted(computed) == list(range(len(computed)))
    changed = [*options(cells, "b.zarr")]
    computed.clear()
    call(*changed, code=143)
    assert "options" in call(*changed, "--min-size", 7, code=2)
    call(*changed, "--min-size", 7, "--overwrite")


def write_maps(path: Path, channels_CZYX: np.ndarray, names: tuple[str, ...], **record: object) -> None:
    """Probabilities as `affmae predict` writes them."""
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space"} for axis in "zyx")]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * 4}]}
    named = {"channels": [{"label": name} for name in names]}
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}], "omero": named}
    group = zarr.create_group(path, attributes={"ome": ome, "affmae_prediction": record})
    group.create_array("0", data=channels_CZYX)


def test_boundary_and_distance_channels_are_used(tmp_path: Path) -> None:
    centers = np.random.default_rng(1).uniform(0, 1, (12, 2)) * (96, 128)
    grid = np.stack(np.indices((96, 128)), -1)[..., None, :]
    true = ((grid - centers) ** 2).sum(-1).argmin(-1) + 1  # cells without anything in between
    targets = instance_targets(true)
    inside = np.ones(true.shape)
    maps = (255 * np.stack([1 - inside, inside, targets.boundary_HW, targets.distance_HW])).astype(np.uint8)[:, None]
    write_maps(tmp_path / "m.zarr", maps, channel_names(("background", "cell")), distance_cap=DISTANCE_CAP)
    call(tmp_path / "m.zarr", "-o", tmp_path / "o.tif", "--workers", 1)
    scores = score_objects(true, voxels(tmp_path / "o.tif"))
    assert scores.predicted_objects == 12 and scores.f1_75 == 1
    write_maps(tmp_path / "n.zarr", maps, channel_names(("background", "cell")))
    assert "scale" in call(tmp_path / "n.zarr", "-o", tmp_path / "p.tif", code=3)


def test_probabilities_in_several_orientations_are_averaged(tmp_path: Path) -> None:
    inside = ndimage.binary_dilation(
        np.zeros((1, 40, 60), bool) | (np.indices((1, 40, 60))[2] % 30 == 15), iterations=9
    )
    for name, noise in (("xy", 0), ("xz", 1), ("yz", 2)):
        values = np.where(inside, 200, 40) + np.random.default_rng(noise).integers(-35, 36, inside.shape) * (noise > 0)
        channels = np.stack([255 - values, values]).astype(np.uint8)
        write_maps(tmp_path / f"{name}.zarr", channels, ("background", "mito"))
    sources = [tmp_path / f"{name}.zarr" for name in ("xy", "xz", "yz")]
    call(*sources, "-o", tmp_path / "o.tif", "--classes", "mito", "--workers", 1, "--method", "components")
    found = voxels(tmp_path / "o.tif")
    np.testing.assert_array_equal(found > 0, inside[0])
    assert found.max() == 2
    tight = call(*sources, "-o", tmp_path / "p.tif", "--set", "foreground=0.9", "--workers", 1, "--json", "-q")
    assert json.loads(tight)["counts"] == {"mito": 0}


def test_tuned_options_are_better_and_stored_with_the_model(cells: Path) -> None:
    run = cells.with_name("run")
    run.mkdir()
    base = [cells, "--classes", "2", "--boundary-class", "1", "--set", "seed_distance=1"]
    answer = json.loads(
        call(*base, "--tune", cells.with_name("true.tif"), "--region", "0:24,0:40,0:48", "-m", run, "--json", "-q")
    )
    assert answer["options"]["seed_distance"] > 1
    assert json.loads((run / "objects.json").read_text())["options"] == answer["options"]
    report = json.loads(call(*base[:-2], "-m", run, "-o", cells.with_name("t.zarr"), "--workers", 1, "--json", "-q"))
    assert report["options"] == answer["options"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--classes", "mito"], 2, "no class 'mito'"),
        (["--classes", "2,2"], 2, "twice"),
        (["-o", "objects.png"], 2, ".zarr"),
        (["--set", "speed=3"], 2, "not an option"),
        (["--set", "boundary=high"], 2, "not a valid value"),
        (["--set", "boundary=1.5"], 2, "not within 0 and 1"),
        (["--shard", "3/2"], 2, "--shard"),
        (["--block", "4,4,4"], 2, "too small"),
        (["--block", "64,64"], 2, "three whole numbers"),
        (["--boundary", "other.tif"], 3, "same shape"),
        (["-m", "absent"], 3, "no model"),
        (["--tune", "true.tif", "--region", "9:3,:,:"], 3, "empty"),
        (["-o", "classes.tif", "--overwrite"], 2, "touch the input"),
    ],
)
def test_refusals(cells: Path, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cells.parent)
    tifffile.imwrite("other.tif", np.zeros((3, 60, 70), np.uint8), photometric="minisblack")
    before = cells.read_bytes()
    assert message in call("classes.tif", "--workers", "1", *arguments, code=code).replace("\n", " ")
    assert cells.read_bytes() == before
    assert not list(cells.parent.glob("*-objects.zarr"))


def test_a_folder_of_something_else_is_not_replaced(cells: Path) -> None:
    other = cells.with_name("precious.zarr")
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "not replaced" in call(*options(cells, "precious.zarr"), "--overwrite", code=2)
    assert (other / "notes.txt").read_text() == "mine"
    call(*options(cells, "ours.zarr"))
    call(*options(cells, "ours.zarr"), "--overwrite")


def test_an_object_map_is_not_taken_for_a_class_map(cells: Path) -> None:
    assert "looks like objects already" in call(cells.with_name("true.tif"), code=3)
