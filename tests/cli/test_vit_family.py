"""The model family ViT-MAE through the commands: pretrain, resume, finetune, predict, and told from AFFMAE."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine.data.ingest import ingest
from affmae_engine.run_dir import RunDir
from affmae_engine.weights import read_metadata

SMALL = (
    "--preset", "demo", "--device", "cpu",
    *(
        word
        for setting in (
            "model.size=tiny", "data.crop_size=64", "data.workers=0", "data.holdout=0.3", "mask.lattices=[4]",
            "train.batch_size=2", "train.micro_batch=2", "train.log_every=1", "train.eval_every=0",
        )
        for word in ("--set", setting)
    ),
)  # fmt: skip
VIT = ("--set", "model.family=vit-mae")


def affmae(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack with bright squares, their labels, and the stack as a dataset."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (6, 6, 6)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    image = labels * np.uint8(120) + rng.integers(0, 30, labels.shape, dtype=np.uint8)
    tifffile.imwrite(folder / "image.tif", image, photometric="minisblack")
    tifffile.imwrite(folder / "labels.tif", labels, photometric="minisblack")
    ingest([folder / "image.tif"], folder / "em.zarr")
    return folder


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, then of two more."""
    run = tmp_path_factory.mktemp("runs") / "vit"
    done = affmae("pretrain", data / "em.zarr", *SMALL, *VIT, "--steps", 2, "-o", run, "-q")
    assert done.exit_code == 0, done.output
    done = affmae("pretrain", "--resume", run, "--steps", 4, "-q")
    assert done.exit_code == 0, done.output
    return run


@pytest.fixture(scope="module")
def finetuned(data: Path, pretrained: Path) -> tuple[Path, dict]:
    """A segmenter from it, which follows its family unasked, and the command's summary."""
    run = pretrained.parent / "seg"
    labelled = ("--images", data / "image.tif", "--labels", data / "labels.tif")
    done = affmae("finetune", *labelled, *SMALL, "--init-from", pretrained, "--steps", 2, "-o", run, "--json", "-q")
    assert done.exit_code == 0, done.output
    return run, json.loads(done.stdout)


def test_pretraining_is_that_of_the_loop(pretrained: Path) -> None:
    run = RunDir(pretrained)
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    assert all(event["losses"]["loss"] == event["losses"]["last"] > 0 for event in steps)
    (started, resumed) = [event for event in events if event["kind"] == "run_started"]
    assert resumed["resumed"] and started["backends"] == {} and 0.9e6 < started["parameters"] < 1.1e6
    evaluated = [event for event in events if event["kind"] == "evaluated"][-1]
    assert len(evaluated["effective_rank"]) == 1 and evaluated["metrics"]["last"] > 0
    assert run.preview(4, "").is_file()
    assert read_metadata(run.checkpoint(4) / "weights.safetensors").model["family"] == "vit-mae"


def test_finetuning_says_what_it_took_over(finetuned: tuple[Path, dict]) -> None:
    run, summary = finetuned
    groups = {(group["part"], group["outcome"]) for group in summary["transfer"]}
    loaded = {(part, "loaded") for part in ("encoder.embed", "encoder.blocks", "decoder.blocks", "heads")}
    assert loaded | {("heads", "adapted"), ("decoder.mask_token", "skipped")} <= groups
    assert not any(outcome == "missing" for _, outcome in groups)
    assert RunDir(run).read_config().model.family == "vit-mae"


@pytest.mark.parametrize("tile", [48, 80])
def test_prediction_with_tiles_of_another_size(data: Path, finetuned: tuple[Path, dict], tile: int, tmp_path) -> None:
    out = tmp_path / "labels.tif"
    done = affmae("predict", data / "image.tif", "-m", finetuned[0], "-o", out, "--tile", tile, "--device", "cpu", "-q")
    assert done.exit_code == 0, done.output
    labels = tifffile.imread(out)
    assert labels.shape == (6, 96, 96) and labels.max() <= 1


def test_pretraining_goes_on_from_a_segmenter(data: Path, finetuned: tuple[Path, dict], tmp_path) -> None:
    out = tmp_path / "again"
    done = affmae("pretrain", data / "em.zarr", *SMALL, *VIT, "--init-from", finetuned[0], "--steps", 1, "-o", out)
    assert done.exit_code == 0, done.output
    assert "is a segmenter: its heads were left out" in done.stderr


def test_the_wrong_family_is_one_line(data: Path, pretrained: Path, tmp_path) -> None:
    labelled = ("--images", data / "image.tif", "--labels", data / "labels.tif")
    other = ("--set", "model.family=affmae")
    commands = [
        ("pretrain", data / "em.zarr", *SMALL, "--init-from", pretrained, "-o", tmp_path / "a"),
        ("finetune", *labelled, *SMALL, *other, "--init-from", pretrained, "-o", tmp_path / "b"),
        ("pretrain", "--resume", pretrained, *other, "--steps", 6),
    ]
    for i, command in enumerate(commands):
        done = affmae(*command)
        said = " ".join(done.stderr.split())
        assert i == 2 or "use --set model.family=vit-mae" in said
        assert done.exit_code == 2 and "Traceback" not in said, done.output
        assert "vit-mae" in said and "affmae" in said and "model.family" in said
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
