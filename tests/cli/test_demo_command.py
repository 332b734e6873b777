"""`affmae demo`: the story end to end on little data, and what it refuses."""

import json
from pathlib import Path

import pytest
import tifffile
from typer.testing import CliRunner

from affmae_cli.commands import demo as command
from affmae_cli.main import app
from affmae_engine.data.phantom import generate, write_tiff

QUICK = {"AFFMAE_TRAIN__STEPS": "2", "AFFMAE_TRAIN__BATCH_SIZE": "2", "AFFMAE_TRAIN__MICRO_BATCH": "2"}
SMALL = {"AFFMAE_DATA__CROP_SIZE": "64", "AFFMAE_DATA__WORKERS": "0"}


def test_phantom_story_ends_with_scores_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"unlabelled": (3, 96, 96), "train": (1, 96, 96), "val": (1, 64, 96), "test": (2, 64, 80)}
    monkeypatch.setattr(command, "_PHANTOMS", {name: (shape, 25) for name, shape in sizes.items()})
    out = tmp_path / "story"
    done = CliRunner().invoke(app, ["demo", "-o", str(out), "--json", "--seed", "1"], env=QUICK | SMALL)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["scores"]) == {"pretrained", "from scratch"}
    for score in result["scores"].values():
        assert set(score["per_class"]) == {"cytoplasm", "membrane", "mitochondria"}
        assert 0 <= score["mean_iou"] <= 1
    assert tifffile.imread(result["labels"]).shape == sizes["test"]
    assert Path(result["overlay"]).is_file() and Path(result["reconstruction"]).is_file()
    assert "$ affmae pretrain" in done.stderr and "--init-from" in done.stderr

    again = CliRunner().invoke(app, ["demo", "-o", str(out)])
    assert again.exit_code == 2 and "--overwrite" in again.output


def test_own_data_is_scored_on_its_validation_part(tmp_path: Path) -> None:
    for number in range(3):
        write_tiff(generate((1, 80, 80), seed=number), tmp_path / f"{number}.tif", tmp_path / f"{number}_labels.tif")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for file in sorted(tmp_path.glob("*.tif")):
        file.rename(tmp_path / ("labels" if "labels" in file.name else "images") / file.name)
    names = {"AFFMAE_FINETUNE__CLASS_NAMES": '["a", "b", "c", "d", "e"]'}
    done = CliRunner().invoke(
        app,
        ["demo", "-o", str(tmp_path / "o"), "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")],
        env=QUICK | SMALL | names,
    )
    assert done.exit_code == 0, done.output
    assert "Scores on the validation part" in done.stdout
    assert (tmp_path / "o" / "labels-finetune.tif").is_file()


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--images", str(tmp_path), "-o", str(tmp_path / "o")])
    assert done.exit_code == 2 and "--images and --labels go together" in done.output
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else_is_never_deleted(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    done = CliRunner().invoke(app, ["demo", "-o", str(precious), "--overwrite"])
    assert done.exit_code == 2 and "was not made by affmae demo" in done.output
    assert (precious / "chapter.txt").read_text() == "years of work"
