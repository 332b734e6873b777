"""`affmae predict` on real files with a small random network: results, choices, refusals with their exit codes."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine import checkpoint, run_dir
from affmae_engine.config import RunConfig
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.weights import WeightsMetadata

CONFIG = RunConfig.model_validate({"model": {"size": "tiny"}, "data": {"crop_size": 64}})
NAMES = ("background", "membrane", "mitochondria")


def make_run(root: Path, *, task: str = "finetune", status: str = "finished", step: int = 3) -> Path:
    torch.manual_seed(0)
    run = run_dir.create(root)
    run.write_config(CONFIG, task)
    model = Segmenter(CONFIG.model, 3) if task == "finetune" else MaskedAutoencoder(CONFIG.model, CONFIG.loss)
    about = WeightsMetadata(
        task=task, step=step, model=CONFIG.model.model_dump(mode="json"), image_size=64, pixel_nm=4.0,
        normalisation={"mode": "image", "mean": 0.0, "std": 1.0, "clahe": False},
        class_names=NAMES if task == "finetune" else (), config=CONFIG.model_dump(mode="json"),
    )  # fmt: skip
    checkpoint.save(run, weights=model.state_dict(), optimizer={}, state={}, metadata=about)
    run.summary.write_text(json.dumps({"status": status}))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "seg")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, shape: Sequence[int] = (2, 80, 70), pixel_nm: float = 4.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    scale = (1000 / pixel_nm, 1000 / pixel_nm)
    axes = "ZYX"[-len(shape) :]
    tifffile.imwrite(path, image, imagej=True, resolution=scale, metadata={"axes": axes, "unit": "um", "spacing": 0.04})
    return path


def affmae(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", "--device", "cpu", *map(str, arguments)])


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_labels_table_and_overlay_in_their_default_places(here: Path, trained: Path) -> None:
    result = affmae(write(here / "in" / "cells.tif"), "-m", trained)
    assert result.exit_code == 0, result.output
    labels = tifffile.imread(here / "predictions" / "cells-labels.tif")
    assert labels.shape == (2, 80, 70) and labels.dtype == np.uint8 and labels.max() < 3
    assert (here / "predictions" / "cells-labels-overlay.png").is_file()
    for text in ("predictions/cells-labels.tif", "ImageJ TIFF", "2 x 80 x 70", "40, 4, 4 nm", "membrane", "Mpx/s"):
        assert text in one_line(result.stdout)
    assert str(trained) in result.stderr and "CPU" in result.stderr


def test_json_names_everything(here: Path, trained: Path) -> None:
    weights = checkpoint.weights_file(trained)
    result = affmae(
        write(here / "a.tif"), "-m", weights, "-o", here / "out.ome.zarr", "--probabilities", "--no-overlay", "--json",
        "--tile", 40, "--overlap", 0.25, "--batch", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (report,) = document["predictions"]
    assert document["class_names"] == list(NAMES) and document["step"] == 3
    assert report["labels"] == str(here / "out.ome.zarr") and report["format"] == "OME-Zarr 0.5"
    assert report["overlay"] is None and report["tile"] == 40
    assert sum(report["class_fractions"].values()) == pytest.approx(1)
    assert (here / "out-probabilities.ome.zarr" / "zarr.json").is_file()


def test_the_model_defaults_to_the_newest_finished_finetune_run(here: Path) -> None:
    for age, (name, more) in enumerate(
        [("new-but-stopped", {"status": "stopped"}), ("pre", {"task": "pretrain"}), ("good", {}), ("old", {})]
    ):
        root = make_run(here / "runs" / name, **more)
        os.utime(root / "config.toml", (1e9 - age, 1e9 - age))
    result = affmae(write(here / "a.tif"), "--no-overlay", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "runs/good"
    assert "runs/good" in result.stderr


def test_no_run_to_use(here: Path) -> None:
    result = affmae(write(here / "a.tif"))
    assert result.exit_code == 3 and "no finished finetune run in runs" in one_line(result.stderr)
    make_run(here / "runs" / "half", status="stopped")
    result = affmae(here / "a.tif")
    assert result.exit_code == 3 and "half" in result.stderr and "-m" in result.stderr


def test_a_folder_keeps_its_names_and_passes_over_what_cannot_be_read(here: Path, trained: Path) -> None:
    folder = here / "scans"
    write(folder / "a.tif")
    write(folder / "day2" / "b.tif", (60, 50))
    broken = write(folder / "broken.tif")
    broken.write_bytes(broken.read_bytes()[:3000])
    result = affmae(folder, "-m", trained, "-o", here / "out", "--no-overlay")
    assert result.exit_code == 0, result.output
    written = sorted(str(path.relative_to(here / "out")) for path in (here / "out").rglob("*") if path.is_file())
    assert written == ["a.tif", "day2/b.tif"]
    assert "broken.tif" in result.stderr and "passed over" in result.stderr
    assert "2 predicted, 1 passed over" in result.stdout
    again = affmae(folder, "-m", trained, "-o", here / "out", "--no-overlay")
    assert again.exit_code == 0 and "2 finished before, 0 predicted" in again.stdout
    inside = affmae(folder, "-m", trained, "-o", folder / "labels", "--no-overlay")
    assert inside.exit_code == 0, inside.output
    once_more = affmae(folder, "-m", trained, "-o", folder / "labels", "--no-overlay", "--overwrite")
    assert once_more.exit_code == 0 and "2 predicted" in once_more.stdout  # earlier results are not inputs


def test_scoring_again_with_results_and_truth_inside_the_input_folder(here: Path, trained: Path) -> None:
    for name in ("a", "b"):
        write(here / "in" / f"{name}.tif", (40, 40))
        classes = np.zeros((40, 40), np.uint8)
        (here / "in" / "truth").mkdir(exist_ok=True)
        tifffile.imwrite(here / "in" / "truth" / f"{name}.tif", classes, photometric="minisblack")
    command = "in", "-m", trained, "-o", "in/seg", "--no-overlay", "--labels", "in/truth", "--json"
    for more in ((), ("--overwrite",)):
        result = affmae(*command, *more)
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["score"]["per_image"]) == 2
    (here / "in" / "b.tif").write_bytes(b"II*\0")
    broken = affmae(*command, "--overwrite")
    assert broken.exit_code == 3 and "b.tif: labels without an image" in one_line(broken.stderr)
    assert "passed over before: 1 input, the first: cannot read in/b.tif" in one_line(broken.stderr)


def test_names_that_clash_are_refused_before_any_work(here: Path, trained: Path) -> None:
    write(here / "scans" / "a.tif")
    write(here / "scans" / "a.tiff")
    result = affmae(here / "scans", "-m", trained)
    assert result.exit_code == 2 and "would both be written to" in one_line(result.stderr)
    assert not any((here / "predictions").rglob("*.tif"))


def test_a_file_of_several_images_gives_a_file_each(here: Path, trained: Path) -> None:
    with tifffile.TiffWriter(here / "two.tif") as tiff:
        for edge in (40, 56):
            tiff.write(
                np.random.default_rng(edge).integers(0, 255, (edge, edge)).astype(np.uint8), photometric="minisblack"
            )
    result = affmae(here / "two.tif", "-m", trained, "--no-overlay", "--json")
    assert result.exit_code == 0, result.output
    paths = [Path(report["labels"]) for report in json.loads(result.stdout)["predictions"]]
    assert len(set(paths)) == 2 and sorted(tifffile.imread(path).shape for path in paths) == [(40, 40), (56, 56)]
    one_file = affmae(here / "two.tif", "-m", trained, "-o", here / "x.tif")
    assert one_file.exit_code == 2 and "holds 2 images" in one_file.stderr


def test_planes_are_rescaled_unless_told_otherwise(here: Path, trained: Path) -> None:
    path = write(here / "a.tif", pixel_nm=8.0)
    result = affmae(path, "-m", trained, "--no-overlay", "--no-rescale")
    assert "8 nm" in result.stderr and "4 nm" in result.stderr and "--no-rescale" in result.stderr
    result = affmae(path, "-m", trained, "--no-overlay", "--overwrite", "--json")
    assert json.loads(result.stdout)["predictions"][0]["rescaled_to"] == [160, 140]
    assert tifffile.imread(here / "predictions" / "a-labels.tif").shape == (2, 80, 70)
    result = affmae(path, "-m", trained, "--no-overlay", "--overwrite", "--pixel-size", "30,4,4", "--json")
    assert json.loads(result.stdout)["predictions"][0]["pixel_nm"] == [30, 4, 4]
    assert json.loads(result.stdout)["predictions"][0]["rescaled_to"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nothing.tif"], 3, "no such file or folder: nothing.tif"),
        (["notes.txt"], 3, "notes.txt"),
        (["cut.tif"], 3, "cut.tif"),
        (["empty"], 3, "no images found in empty"),
        (["a.tif", "-o", "out.png"], 2, "out.png: labels are written as .tif, .tiff or .zarr"),
        (["a.tif", "-o", "a.tif", "--overwrite"], 2, "would replace the input"),
        (["a.tif", "-o", "notes.txt/out.tif"], 4, "notes.txt"),
        (["a.tif", "-o", "loop/out.tif"], 4, "loop"),
        (["a.tif", "b.tif", "-o", "out.tif"], 2, "several inputs cannot go into the one file"),
        (["a.tif", "--pixel-size", "1,2,3,4"], 2, "--pixel-size '1,2,3,4' is not a voxel size"),
        (["a.tif", "--pixel-size", "0,4,4"], 2, "is not a voxel size"),
        (["a.tif", "--gpus", "2"], 2, "--gpus 2: no GPU can be used here"),
        (["a.tif", "--gpus", "no"], 2, "give a number of GPUs, or all"),
        (["a.tif", "-o", "o.zarr", "--shard", "3/3"], 2, "parts of 3 are 0 to 2"),
        (["a.tif", "-o", "o.zarr", "--shard", "1"], 2, "--shard '1' is not of the form I/N"),
        (["a.tif", "-o", "o.tif", "--shard", "0/3"], 2, "a TIFF is one file"),
        (["a.tif", "-o", "o.zarr", "--shard", "0/3", "--gpus", "1"], 2, "give one of them"),
        (["a.tif", "-o", "o.zarr", "--finish"], 2, "under way"),
        (["a.tif", "--planes", "xy,zz"], 2, "orientations are xy, xz, yz"),
        (["a.tif", "--dask", "tcp://127.0.0.1:1"], 4, "no dask scheduler answers at tcp://127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, text: str
) -> None:
    monkeypatch.setattr("affmae_engine.predict.cluster.CONNECT_S", 1)
    write(here / "a.tif")
    write(here / "b.tif")
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("no image")
    (here / "loop").symlink_to("loop")
    cut = write(here / "cut.tif")
    cut.write_bytes(cut.read_bytes()[:4000])
    result = affmae(*arguments, "-m", trained)
    assert result.exit_code == code, result.output
    assert text in one_line(result.stderr) and "Traceback" not in result.output
    assert not list(here.glob("**/*labels*")) and not list(here.glob("o.*")) and not list(here.glob(".o*"))


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("missing", 3, "no such run, checkpoint or weights file: missing"),
        ("empty", 3, "empty is neither a run directory nor a checkpoint"),
        ("a.tif", 3, "is not an affmae weights file"),
        ("pre", 3, "pre was pretrained and knows no classes yet"),
    ],
)
def test_models_that_cannot_be_used(here: Path, model: str, code: int, text: str) -> None:
    write(here / "a.tif")
    (here / "empty").mkdir()
    make_run(here / "pre", task="pretrain")
    result = affmae("a.tif", "-m", model)
    assert result.exit_code == code, result.output
    assert text in one_line(result.stderr)
    if model == "pre":
        assert "affmae finetune" in result.stderr


def test_weights_that_do_not_fit_their_description_are_corrupt(here: Path, trained: Path) -> None:
    from affmae_engine.weights import read_metadata, read_tensors, write_weights

    file = checkpoint.weights_file(trained)
    tensors = read_tensors(file)
    tensors.pop(next(iter(tensors)))
    write_weights(here / "w.safetensors", tensors, read_metadata(file))
    write(here / "a.tif")
    result = affmae("a.tif", "-m", "w.safetensors")
    assert result.exit_code == 6 and "does not fit its own description" in one_line(result.stderr)


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(here: Path, trained: Path) -> None:
    write(here / "long.tif", (24, 80, 70))
    command = [sys.executable, "-m", "affmae_cli", "predict", "long.tif", "-m", str(trained), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while "1 image to" not in (line := process.stderr.readline()):
            assert line, "ended before it began"
        while process.poll() is None and not list(here.glob("predictions/.*/blocks/*.json")):
            time.sleep(0.01)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert time.monotonic() - sent < 5
    assert "no output was written yet" in rest and "Traceback" not in rest
    assert [entry.name for entry in (here / "predictions").iterdir()] == [".long-labels.tif.unfinished"]
    other = affmae("long.tif", "-m", trained, "--overlap", "0.25")
    assert other.exit_code == 2 and "unfinished prediction" in one_line(other.stderr)
    assert "another overlap" in one_line(other.stderr)
    again = affmae("long.tif", "-m", trained)
    assert again.exit_code == 0, again.stderr
    assert "blocks were finished before" in one_line(again.stderr)
    assert sorted(e.name for e in (here / "predictions").iterdir()) == ["long-labels-overlay.png", "long-labels.tif"]


def test_the_same_command_passes_over_what_is_finished(here: Path, trained: Path) -> None:
    for name in ("a", "b"):
        write(here / "in" / f"{name}.tif")
    common = "in", "-m", trained, "-o", "out"
    assert affmae(*common).exit_code == 0
    (here / "out" / "b.tif").unlink()
    (here / "out" / "b-overlay.png").unlink()
    before = (here / "out" / "a.tif").stat().st_mtime_ns
    result = affmae(*common, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["finished"] == ["out/a.tif"] and len(document["predictions"]) == 1
    assert (here / "out" / "a.tif").stat().st_mtime_ns == before
    everything = affmae(*common)
    assert everything.exit_code == 0 and "2 finished before, 0 predicted" in one_line(everything.stdout)
    other = affmae(*common, "--tile", 40)
    assert other.exit_code == 2 and "another model, image or options" in one_line(other.stderr)


def test_shards_of_separate_commands(here: Path, trained: Path) -> None:
    write(here / "a.tif", (6, 40, 40))
    common = "a.tif", "-m", trained, "--no-overlay"
    assert affmae(*common, "-o", "whole.zarr").exit_code == 0
    for part in (2, 0):
        result = affmae(*common, "-o", "parts.zarr", "--shard", f"{part}/3")
        assert result.exit_code == 0 and "this part is done" in one_line(result.stdout), result.output
    refused = affmae(*common, "-o", "parts.zarr", "--finish")
    assert refused.exit_code == 2 and "2 of 6 blocks" in one_line(refused.stderr)
    last = affmae(*common, "-o", "parts.zarr", "--shard", "1/3", "--json")
    assert len(json.loads(last.stdout)["predictions"]) == 1
    again = affmae(*common, "-o", "parts.zarr", "--shard", "1/3")
    assert again.exit_code == 0 and "1 finished before" in one_line(again.stdout)
    whole, parts = (zarr.open_array(here / f"{n}.zarr" / "labels" / n / "0", mode="r")[:] for n in ("whole", "parts"))
    assert np.array_equal(whole, parts)


def test_a_plan_is_printed_and_nothing_is_written(here: Path, trained: Path) -> None:
    write(here / "a.tif", (6, 40, 40))
    result = affmae("a.tif", "-m", trained, "-o", "out/a.zarr", "--plan")
    assert result.exit_code == 0, result.output
    for text in ("6 of 1 x 40 x 40 voxels, 0 finished", "tiles/s measured on CPU", "free"):
        assert text in one_line(result.stdout)
    (plan,) = json.loads(affmae("a.tif", "-m", trained, "-o", "out/a.zarr", "--plan", "--json").stdout)["plans"]
    assert plan["tiles"] == 54 and plan["tiles_per_s"] > 0 and list((here / "out").iterdir()) == []


def test_scores_are_written_and_training_data_is_named(here: Path, trained: Path) -> None:
    write(here / "in" / "a.tif", (2, 40, 40))
    tifffile.imwrite(here / "truth.tif", np.zeros((2, 40, 40), np.uint8), photometric="minisblack")
    common = "in/a.tif", "-m", trained, "-o", "out/a.tif", "--labels", "truth.tif"
    result = affmae(*common)
    assert result.exit_code == 0 and "scores.json" in result.stderr and "trained on" not in result.stderr
    values = json.loads((here / "out" / "scores.json").read_text())
    assert values["images"][0]["per_class"]["background"]["recall"] == pytest.approx(values["mean_iou"])
    assert (here / "out" / "scores.csv").read_text().startswith("image,class,iou,dice,precision,recall,boundary_f1")
    (here / "out" / "scores.json").unlink()
    assert affmae(*common).exit_code == 0 and (here / "out" / "scores.json").is_file()  # the labels were finished


def test_how_to_open_the_result_is_told(here: Path, trained: Path) -> None:
    path = write(here / "a.tif", (1, 40, 40))
    tiff, volume = affmae(path, "-m", trained), affmae(path, "-m", trained, "-o", "a.zarr")
    assert "open: in Fiji: File > Open" in tiff.stderr and "napari predictions/a-labels.tif" in tiff.stderr
    assert "napari --plugin napari-ome-zarr a.zarr" in volume.stderr and "Fiji" in volume.stderr


def test_progress_lines_have_rate_and_eta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from affmae_cli import output, prediction_progress
    from affmae_engine.predict.run import PredictProgress

    output.console.cache_clear()
    monkeypatch.setattr(prediction_progress, "SECONDS_BETWEEN_LINES", 2.0)
    seconds = iter((1.0, 2.0, 3.0, 4.0))
    view = prediction_progress.PredictionView(1, None, clock=lambda: next(seconds))
    for done in (4, 8, 12, 16):
        view.progress(PredictProgress("cells [red]", done // 10, 4, done, 40))
    output.console.cache_clear()
    assert capsys.readouterr().err == "cells [red]: 1/4 sections, 12/40 tiles, 4.0 tiles/s, eta 7 s\n"


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_strangers_files_run_nothing_wherever_they_are_named(here: Path) -> None:
    canary = here / "canary"
    torch.save({"model": Canary(canary)}, here / "evil.pt")
    (here / "evil.safetensors").write_bytes((here / "evil.pt").read_bytes())
    np.save(here / "evil.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
    distributed = here / "distributed"
    distributed.mkdir()
    (distributed / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    image = write(here / "a.tif")
    for name, code in (("evil.pt", 3), ("evil.safetensors", 3), ("evil.npy", 3), ("distributed", 3)):
        for arguments in (
            ["predict", image, "-m", here / name],
            ["pretrain", "--resume", here / name],
            ["pretrain", here / "absent.zarr", "--init-from", here / name, "--steps", 1],
            ["ingest", here / name, "-o", here / "em.zarr"],
        ):
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert result.exit_code in {code, 2, 3}, (arguments, result.output)
            assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
        assert affmae(image, "-m", here / name).exit_code == code
    assert not canary.exists() and not (here / "em.zarr").exists()


def test_odd_names_go_through(here: Path, trained: Path) -> None:
    names = ["new\nline", "-leading", "[x] [red]", os.fsdecode(b"caf\xe9"), "x" * 200, " spaces ", "ü中"]
    for name in names:
        write(here / "in" / f"{name}.tif", (1, 40, 40))
    result = affmae("in", "-m", trained, "-o", "out", "--no-overlay")
    assert result.exit_code == 0, result.output
    assert {file.stem for file in (here / "out").iterdir()} == set(names)
    assert affmae("in", "-m", trained, "-o", "out", "--no-overlay").exit_code == 0


def test_sizes_are_trusted_when_asked(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affmae_engine.data.readers.limits.HARMLESS", 0)
    monkeypatch.setattr("affmae_engine.data.readers.limits.LARGEST_RATIO", 2)
    tifffile.imwrite(here / "a.tif", np.zeros((80, 80), np.uint8), compression="zlib")
    refused = affmae("a.tif", "-m", trained)
    assert refused.exit_code == 3 and "--trust-sizes" in one_line(refused.stderr)
    assert affmae("a.tif", "-m", trained, "--trust-sizes").exit_code == 0
    assert affmae("a.tif", "-m", trained, "--overwrite").exit_code == 3  # it is not remembered


def test_a_model_with_edited_settings_is_corrupt(here: Path, trained: Path) -> None:
    from affmae_engine.weights import read_metadata, read_tensors, write_weights

    weights = checkpoint.weights_file(trained)
    known = read_metadata(weights)
    for change in ({"predict": {"tile": "many"}}, {"predict": {"overlap": 7}}):
        write_weights(here / "w.safetensors", read_tensors(weights), known.model_copy(update={"config": change}))
        result = affmae(write(here / "a.tif"), "-m", here / "w.safetensors")
        assert result.exit_code == 6 and "was it edited?" in one_line(result.stderr)


def test_axes_and_channel_are_named_on_the_command_line(here: Path, trained: Path) -> None:
    block = np.random.default_rng(0).integers(0, 255, (60, 50, 4), np.uint8)
    tifffile.imwrite(here / "a.tif", block, metadata=None, photometric="minisblack")
    asked = affmae("a.tif", "-m", trained, "-o", "asked.tif", "--no-overlay")
    assert "--axes YXC" in one_line(asked.stderr) and tifffile.imread(here / "asked.tif").shape == (60, 50, 4)
    assert affmae("a.tif", "-m", trained, "-o", "z.tif", "--axes", "yxz", "--no-overlay").exit_code == 0
    assert tifffile.imread(here / "z.tif").shape == (4, 60, 50)
    assert (
        affmae("a.tif", "-m", trained, "-o", "c.tif", "--axes", "yxc", "--channel", "2", "--no-overlay").exit_code == 0
    )
    # Batches differ, so a few pixels may too.
    same = (tifffile.imread(here / "c.tif") == tifffile.imread(here / "z.tif")).mean(axis=(1, 2))
    assert same[2] > 0.95 > same[[0, 1, 3]].max()
    for wrong, code in ((("--axes", "yx2"), 2), (("--axes", "zyx", "--channel", "1"), 3)):
        assert affmae("a.tif", "-m", trained, "-o", "w.tif", *wrong).exit_code == code
    assert affmae("a.tif", "-m", trained, "-o", "again.tif", "--no-overlay").exit_code == 0  # it is not remembered
    assert tifffile.imread(here / "again.tif").shape == (60, 50, 4)


def test_a_url_is_predicted_like_a_file(here: Path, trained: Path) -> None:
    import functools
    import http.server
    import threading

    import zarr

    pytest.importorskip("tensorstore")
    block = np.random.default_rng(0).integers(0, 255, (2, 60, 50), np.uint8)
    zarr.create_array(here / "served" / "em.zarr", shape=block.shape, dtype="u1", chunks=(1, 60, 50))[:] = block
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(here / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/em.zarr"
        result = affmae(url, "-m", trained, "--no-overlay")
        assert result.exit_code == 0, result.output
        server.shutdown()
    (labels,) = (here / "predictions").glob("*.tif")
    assert "em" in labels.name and tifffile.imread(labels).shape == block.shape
    tifffile.imwrite(here / "em.tif", block, metadata=None, photometric="minisblack")
    assert affmae("em.tif", "-m", trained, "-o", "same.tif", "--no-overlay").exit_code == 0
    np.testing.assert_array_equal(tifffile.imread(labels), tifffile.imread(here / "same.tif"))
