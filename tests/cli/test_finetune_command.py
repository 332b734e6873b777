"""`affmae finetune` on a tiny labelled stack: new runs, every form of bad input, transfer, resuming, signals."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine import checkpoint
from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.run_dir import RunDir
from affmae_engine.weights import WeightsMetadata, write_weights

SMALL = (
    "model.size=tiny",
    "data.crop_size=64",
    "data.workers=0",
    "train.batch_size=2",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.eval_every=0",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and labels/ with six slices each: bright squares are class 1."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for z in range(6):
        labels = rng.integers(0, 2, (5, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        save(
            folder / "images" / f"s{z}.tif", labels * np.uint8(120) + rng.integers(0, 30, labels.shape, dtype=np.uint8)
        )
        save(folder / "labels" / f"s{z}_label.tif", labels)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a masked autoencoder with patches of 4 pixels."""
    path = tmp_path_factory.mktemp("pretrained") / "weights.safetensors"
    model = ModelConfig(size="tiny", patch_size=4)
    record = {"task": "pretrain", "step": 9, "model": model.model_dump(), "image_size": 64, "normalisation": {}}
    write_weights(path, MaskedAutoencoder(model, LossConfig()).state_dict(), WeightsMetadata(**record))
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, photometric="minisblack")


def small(*more: str) -> list[str]:
    return ["--preset", "demo", "--device", "cpu", *(word for pair in (*SMALL, *more) for word in ("--set", pair))]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


def on(data: Path, *more: object, steps: int = 1) -> list[object]:
    return ["--images", data / "images", "--labels", data / "labels", *small(), "--steps", steps, *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("runs") / "finished"
    before = os.umask(0o007)
    try:
        return root, run(*on(data, "-o", root, "--set", 'finetune.class_names=["gap", "cell"]', steps=2))
    finally:
        os.umask(before)


def test_a_new_run_holds_everything(finished: tuple[Path, Result]) -> None:
    root, result = finished
    assert result.exit_code == 0, result.output
    names = {"config.toml", "environment.json", "metrics.jsonl", "data.zarr", "summary.json", "best.json"}
    assert names <= {entry.name for entry in root.iterdir()}
    config = RunDir(root).read_config()
    assert config.finetune.class_names == ("gap", "cell") and len(config.finetune.class_weights) == 2
    metadata, _ = checkpoint.load_weights(root)
    assert metadata.task == "finetune" and metadata.class_names == ("gap", "cell")
    assert (root / "previews" / "step-000002.png").is_file()
    assert "6 labelled images: gap " in result.stderr
    assert re.search(r"cell +0\.\d{3} +0\.\d{3}", result.stdout) and "best mean IoU" in result.stdout
    assert f"affmae predict STACK -m {root}" in result.stderr


def test_files_of_a_run_follow_the_umask(finished: tuple[Path, Result]) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in finished[0].rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o660}, modes
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o770}, modes


def test_json_has_scores_and_transfer(data: Path, pretrained: Path) -> None:
    result = run(*on(data, "--init-from", pretrained, "--json"))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["run"] == "runs/finetune-images" and record["status"] == "finished"
    assert record["per_class"].keys() == {"class0", "class1"} and record["per_class"]["class0"]["pixels"] > 0
    assert {group["outcome"] for group in record["transfer"]} == {"loaded", "adapted"}


def test_weights_decide_the_model_and_every_tensor_is_told(data: Path, pretrained: Path, tmp_path: Path) -> None:
    result = run(*on(data, "--init-from", pretrained, "-o", "a", "--set", "optim.lr=1e-9", "--set", "optim.min_lr=0"))
    assert result.exit_code == 0, result.output
    assert f"model settings follow {pretrained}: patch_size 4" in result.stderr
    assert re.search(r"encoder\.stages +loaded", result.stderr) and re.search(r"heads +adapted +6 ", result.stderr)
    assert RunDir(tmp_path / "a").read_config().model.patch_size == 4
    _, here = checkpoint.load_weights(tmp_path / "a")
    _, there = checkpoint.load_weights(pretrained)
    assert all(np.allclose(here[n], there[n], atol=1e-6) for n in there if not n.startswith("heads."))
    environment = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert sum(group["tensors"] for group in environment["command"]["transfer"]) == len(here)


def test_a_chosen_model_of_another_shape_is_refused(data: Path, pretrained: Path, tmp_path: Path) -> None:
    result = run(*on(data, "--init-from", pretrained, "--set", "model.patch_size=8"))
    assert result.exit_code == 2
    assert "model.patch_size = 8 was asked for" in result.stderr and "has 4" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_model_that_the_weights_decide(pretrained: Path, tmp_path: Path) -> None:
    result = run("--init-from", pretrained, *small(), "--dry-run")
    assert result.exit_code == 0 and "patch_size = 4" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_missing_and_wrong_labels_are_all_listed_and_leave_nothing(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, "d")
    (tmp_path / "d/labels/s1_label.tif").unlink()
    (tmp_path / "d/labels/s4_label.tif").unlink()
    result = run(*on(Path("d"), "-o", "a"))
    assert result.exit_code == 3
    assert "d/images/s1.tif: no labels" in result.stderr and "d/images/s4.tif: no labels" in result.stderr
    save(tmp_path / "d/labels/s1_label.tif", np.zeros((3, 3), np.uint8))
    save(tmp_path / "d/labels/s4_label.tif", np.zeros((4, 4), np.uint8))
    result = run(*on(Path("d"), "-o", "a"))
    assert result.exit_code == 3 and "3 x 3" in result.stderr and "4 x 4" in result.stderr
    for number in (1, 4):
        labels = np.zeros((80, 96), np.uint8)
        labels[:2] = 9
        save(tmp_path / f"d/labels/s{number}_label.tif", labels)
    result = run(*on(Path("d"), "-o", "a"))
    assert result.exit_code == 3 and "value 9: 384 pixels in d/images/s1.tif, d/images/s4.tif" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "needs --images and --labels"),
        (["--images", "empty", "--labels", "empty"], 3, "no images found in empty"),
        (["--images", "nowhere", "--labels", "empty"], 3, "no such file or folder: nowhere"),
        (["--images", "empty", "--labels", "empty", "--pixel-size", "4;4"], 2, "--pixel-size '4;4'"),
        (["--images", "empty", "--labels", "empty", "--init-from", "empty"], 3, "neither a run directory"),
        (["--set", "finetune.clas_names=[]"], 2, "finetune.class_names"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], code: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(*words, "--preset", "demo", "--device", "cpu")
    assert result.exit_code == code, result.output
    assert text in result.stderr and "Traceback" not in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_a_run_is_not_replaced_without_being_told(finished: tuple[Path, Result], data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    before = (copy / "metrics.jsonl").read_bytes()
    result = run(*on(data, "-o", copy))
    assert result.exit_code == 2 and "exists already" in result.stderr
    result = run(*on(data, "-o", copy, "--overwrite", "--init-from", copy))
    assert result.exit_code == 2 and "lies in the run that is to be replaced" in result.stderr
    shutil.copytree(data, copy / "data")
    for images in (copy / "data" / "images", tmp_path):  # in it, or around it
        result = run("--images", images, "--labels", data / "labels", *small(), "-o", copy, "--overwrite")
        assert result.exit_code == 2 and "lies in the run that is to be replaced" in result.stderr
    assert (copy / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(copy / "data")
    result = run(*on(data, "-o", copy, "--overwrite", "--init-from", finished[0]))
    assert result.exit_code == 0, result.output
    assert RunDir(copy).checkpoint_steps() == [1]


def test_what_fails_before_training_leaves_no_data_behind(data: Path, tmp_path: Path) -> None:
    result = run(*on(data, "-o", "a", "--set", "finetune.class_weights=[1, 2, 3]"))
    assert result.exit_code == 2 and "class_weights has 3 values" in result.stderr
    assert not (tmp_path / "a/data.zarr").exists() and not (tmp_path / "a/config.toml").exists()
    assert run(*on(data, "-o", "a")).exit_code == 0  # the same place can be used again


def test_validation_images_can_be_given(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, "d")
    for kind in ("images", "labels"):
        (tmp_path / "v" / kind).mkdir(parents=True)
        for path in (tmp_path / "d" / kind).glob("s[45]*"):
            path.rename(tmp_path / "v" / kind / path.name)
    given = ["--val-images", "v/images", "--val-labels", "v/labels"]
    result = run(*on(Path("d"), *given, "-o", "a", "--pixel-size", "40,4,4"))
    assert result.exit_code == 0, result.output
    assert RunDir(tmp_path / "a").read_config().finetune.val_images == ("s4", "s5")
    assert checkpoint.load_weights(tmp_path / "a")[0].pixel_nm == 4
    assert run(*on(Path("d"), *given[:2])).exit_code == 2


def test_resume_needs_nothing_else(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, "d")
    given = on(Path("d"), "-o", "a", steps=2)
    assert run(*given).exit_code == 0
    shutil.rmtree("d")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run("--resume", "moved").exit_code == 2
    result = run("--resume", "moved", "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "resumed at step 2" in result.stderr
    refused = run("--resume", "moved", "--images", "d", "--pixel-size", "4,4,4")
    assert refused.exit_code == 2 and "--images and --pixel-size cannot go with --resume" in refused.stderr


def test_an_interrupted_run_ends_like_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    assert run(*on(data, "-o", "whole", steps=4)).exit_code == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "affmae_cli", "finetune", *map(str, on(data, "-o", "cut", steps=4))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics, deadline = tmp_path / "cut/metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and '"step": 1' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # four steps may be over before the signal arrives
        assert process.returncode == 130, errors
        assert "affmae finetune --resume cut" in errors
        result = run("--resume", "cut")
        assert result.exit_code == 0, result.output
    _, whole = checkpoint.load_weights(tmp_path / "whole", which="last")
    _, cut = checkpoint.load_weights(tmp_path / "cut", which="last")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)
