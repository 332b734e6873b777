"""`--dry-run`: checks of the data, the printed settings, and that the plan is what a run then does."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli import settings
from affmae_cli.main import app
from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.weights import WeightsMetadata, write_weights

SMALL = (
    "model.size=tiny",
    "data.crop_size=64",
    "data.workers=0",
    "data.holdout=0.3",
    "mask.lattices=[4]",
    "train.batch_size=4",
    "train.micro_batch=2",
    "train.eval_every=0",
    "train.preview_every=0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """em.zarr, and images/ and labels/ of six sections."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for z in range(6):
        labels = rng.integers(0, 2, (6, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        image = labels * np.uint8(120) + rng.integers(0, 30, labels.shape, dtype=np.uint8)
        tifffile.imwrite(folder / "images" / f"s{z}.tif", image, photometric="minisblack")
        tifffile.imwrite(folder / "labels" / f"s{z}_label.tif", labels, photometric="minisblack")
    ingest(sorted((folder / "images").iterdir()), folder / "em.zarr")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str, *words: object, small: bool = True) -> Result:
    chosen = [word for pair in SMALL for word in ("--set", pair)] if small else []
    return CliRunner().invoke(app, [command, "--preset", "demo", "--device", "cpu", *chosen, *map(str, words)])


def plan(command: str, *words: object) -> dict[str, Any]:
    result = run(command, *words, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["plan"]


def test_the_plan_of_a_pretraining_is_what_the_run_does(data: Path, tmp_path: Path) -> None:
    planned = plan("pretrain", data / "em.zarr", "--epochs", 1.5)
    assert list(tmp_path.iterdir()) == []
    assert "1 image, 6 sections" in planned["data"]
    assert planned["steps"] == -(-1.5 * planned["samples_per_epoch"] // 4)
    assert planned["epochs"] == pytest.approx(planned["steps"] * 4 / planned["samples_per_epoch"])
    assert planned["micro_batch"] == 2 and 16 * planned["parameters"] < planned["memory_bytes"] < planned["free_bytes"]
    done = run("pretrain", data / "em.zarr", "--epochs", 1.5, "--json", "--no-tui", "-o", "a")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == planned["steps"]


def test_the_plan_of_a_finetuning_is_what_the_run_does(data: Path, tmp_path: Path) -> None:
    words = ["--images", data / "images", "--labels", data / "labels", "--epochs", 2]
    words += ["--set", "finetune.val_fraction=0.34"]
    planned = plan("finetune", *words)
    assert list(tmp_path.iterdir()) == []
    assert planned["data"].startswith("6 label")
    assert any("approximate" in note for note in planned["notes"])
    done = run("finetune", *words, "--json", "--no-tui", "-o", "a")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == pytest.approx(planned["steps"], abs=1)


def test_the_epochs_of_a_given_validation_set_are_exact(data: Path, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        for part in ("train", "val"):
            (tmp_path / part / kind).mkdir(parents=True)
        for path in (data / kind).iterdir():
            shutil.copy(path, tmp_path / ("val" if path.name.startswith("s5") else "train") / kind)
    words: list[object] = ["--images", "train/images", "--labels", "train/labels"]
    words += ["--val-images", "val/images", "--val-labels", "val/labels", "--epochs", 3]
    planned = plan("finetune", *words)
    assert planned["samples_per_epoch"] == round(5 * 96 * 96 / 64**2)
    done = run("finetune", *words, "--json", "--no-tui", "-o", "a")
    assert json.loads(done.stdout)["step"] == planned["steps"]


def test_what_is_printed_can_be_used_as_a_file(data: Path, tmp_path: Path) -> None:
    result = run("pretrain", data / "em.zarr", "--steps", 7, "--dry-run")
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    assert tomllib.loads(result.stdout)["train"]["steps"] == 7
    assert "# data: " in result.stdout and "# length: 7 steps of 4 images" in result.stdout
    assert "# memory: about " in result.stdout
    shown = tmp_path / "shown.toml"
    shown.write_text(result.stdout, "utf-8")
    again = settings.resolve("pretrain", preset="em-base", config_file=shown, environ={}).config
    flags = {"steps": 7, "device": "cpu"}
    assert again == settings.resolve("pretrain", preset="demo", overrides=SMALL, flags=flags, environ={}).config


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["missing.zarr"], 3, "no such dataset: missing.zarr"),
        ([], 3, "em.zarr"),
        (["images"], 3, "is not a dataset"),
        (["em.zarr", "--init-from", "missing"], 3, "missing"),
        (["em.zarr", "--set", "optim.lrr=1"], 2, "optim.lr"),
        (["em.zarr", "--set", "data.crop_size=100000"], 3, "nothing to train on"),
    ],
)
def test_a_dry_run_finds_what_the_run_would_fail_at(
    words: list[str], code: int, text: str, data: Path, tmp_path: Path
) -> None:
    there = [str(data / word) if (data / word).exists() else word for word in words]
    result = run("pretrain", *there, "--dry-run")
    assert result.exit_code == code and text in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_finetuning_checks_the_labels(data: Path) -> None:
    result = run("finetune", "--images", data / "images", "--labels", "nowhere", "--dry-run")
    assert result.exit_code == 3 and "nowhere" in result.stderr
    result = run("finetune", "--images", data / "images", "--dry-run")
    assert result.exit_code == 2 and "--labels" in result.stderr


def test_without_data_a_finetuning_shows_settings_and_memory() -> None:
    planned = plan("finetune", "--epochs", 3)
    assert planned["data"] is None and planned["steps"] is None and planned["epochs"] == 3
    assert planned["memory_bytes"] > 0
    assert plan("finetune", "--steps", 3)["steps"] == 3


def test_more_memory_than_there_is_is_told(data: Path) -> None:
    batch = ("--set", "train.batch_size=2000000", "--set", "train.micro_batch=none")
    planned = plan("pretrain", data / "em.zarr", *batch)
    assert planned["memory_bytes"] > planned["free_bytes"]
    assert any("choose a smaller --batch" in note for note in planned["notes"])


def test_line_ends_in_names_stay_in_the_comments(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "em.zarr", tmp_path / "a\nb.zarr")
    (tmp_path / "c\nd.toml").write_text("[train]\nseed = 3\n")
    result = run("pretrain", "a\nb.zarr", "--config", "c\nd.toml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert tomllib.loads(result.stdout)["train"]["seed"] == 3
    assert "a\\nb.zarr: 1 image" in result.stdout and "# c\\nd.toml" in result.stdout


def test_a_vit_needs_more_memory(data: Path) -> None:
    words = [data / "em.zarr", "--set", "model.size=small", "--set", "data.crop_size=96", "--batch", 4]
    ours, vit = plan("pretrain", *words), plan("pretrain", *words, "--set", "model.family=vit-mae")
    assert vit["steps"] == ours["steps"] and vit["memory_bytes"] > 16 * vit["parameters"] > 0


def test_a_file_whose_name_begins_with_preset_is_the_user_s(tmp_path: Path) -> None:
    """What it sets of the model is chosen, so weights of another shape are refused."""
    model = ModelConfig(size="tiny", patch_size=4)
    record = {"task": "pretrain", "step": 9, "model": model.model_dump(), "image_size": 64, "normalisation": {}}
    weights = MaskedAutoencoder(model, LossConfig()).state_dict()
    write_weights(tmp_path / "weights.safetensors", weights, WeightsMetadata(**record))
    words = ["--init-from", "weights.safetensors", "--dry-run"]
    assert run("finetune", *words).exit_code == 0
    (tmp_path / "presets.toml").write_text("[model]\npatch_size = 8\n")
    result = run("finetune", *words, "--config", "presets.toml")
    assert result.exit_code == 2 and "model.patch_size = 8 was asked for" in result.stderr
