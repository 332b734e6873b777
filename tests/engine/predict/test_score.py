"""Scores of predictions against labels drawn by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import distance_transform_edt

from affmae_engine import run_dir
from affmae_engine.config import RunConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.data.labels.pairing import pair_labels
from affmae_engine.errors import InputError
from affmae_engine.predict import score as module
from affmae_engine.predict.score import TOLERANCE, Predicted, TrainedOn, read_truth, score, write_scores

NAMES = ("background", "membrane")


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, photometric="minisblack")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(0)
    image = write(tmp_path / "a.tif", rng.integers(0, 255, (2, 4, 5), np.uint8))
    classes = np.zeros((2, 4, 5), np.uint8)
    classes[0, :2] = 1
    classes[1, 3] = 9
    truth = write(tmp_path / "a_labels.tif", classes)
    guess = np.zeros((2, 4, 5), np.uint8)
    guess[0, 0] = 1
    guess[1, 3] = 1
    return image, truth, write(tmp_path / "out.tif", guess)


def predicted(image: Path, labels: Path) -> Predicted:
    return Predicted([(str(image), "")], labels)


def test_counts_every_pixel_but_the_ignored(files: tuple[Path, Path, Path]) -> None:
    image, truth, labels = files
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    found = score([predicted(image, labels)], checked)
    # membrane: 5 of 10 found, none wrong (the wrong ones are ignored); background: 25 right, 5 too many
    assert found.confusion == [[25, 0], [5, 5]]
    membrane, background = found.per_class["membrane"], found.per_class["background"]
    assert membrane["iou"] == pytest.approx(5 / 10) and background["iou"] == pytest.approx(25 / 30)
    assert membrane["dice"] == pytest.approx(2 * 5 / 15)
    assert membrane["precision"] == 1 and membrane["recall"] == pytest.approx(0.5)
    assert background["precision"] == pytest.approx(25 / 30) and background["recall"] == 1
    assert found.mean_iou == pytest.approx((5 / 10 + 25 / 30) / 2)
    assert list(found.per_image.values()) == [pytest.approx(found.mean_iou)]
    assert len(found.images) == 1 and found.images[0].confusion == found.confusion


@pytest.mark.parametrize("rows", [1 << 24, 7])
def test_boundary_f1_is_that_of_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "_ROWS_PIXELS", rows * 50)
    rng = np.random.default_rng(1)
    true = np.digitize(rng.normal(size=(6, 5)).repeat(10, 0).repeat(10, 1), (0, 1)).astype(np.uint8)
    guess = np.roll(true, (1, 3), (0, 1))
    image = write(tmp_path / "a.tif", rng.integers(0, 255, true.shape, np.uint8))
    truth, labels = write(tmp_path / "t.tif", true), write(tmp_path / "p.tif", guess)
    checked = read_truth([image], [truth], class_names=("x", "y", "z"), ignore_label=None)
    found = score([predicted(image, labels)], checked)

    def edge(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, 1, mode="edge")
        neighbors = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
        return np.any([other != values for other in neighbors], axis=0)

    for k, name in enumerate(("x", "y", "z")):
        p, t = edge(guess) & (guess == k), edge(true) & (true == k)
        precision = (distance_transform_edt(~t)[p] <= TOLERANCE).mean()
        recall = (distance_transform_edt(~p)[t] <= TOLERANCE).mean()
        assert 0.2 < recall < 1
        expected = 2 * precision * recall / (precision + recall)
        assert found.per_class[name]["boundary_f1"] == pytest.approx(expected)


def test_a_perfect_prediction_and_an_absent_class(tmp_path: Path) -> None:
    true = np.zeros((1, 30, 30), np.uint8)
    true[0, :, 10:20] = 1
    image = write(tmp_path / "a.tif", np.arange(900, dtype=np.uint16).reshape(30, 30))
    truth = write(tmp_path / "t.tif", true[0])
    checked = read_truth([image], [truth], class_names=(*NAMES, "never"), ignore_label=None)
    found = score([predicted(image, truth)], checked)
    assert found.per_class["membrane"]["boundary_f1"] == 1 and found.mean_iou == 1
    assert all(math.isnan(found.per_class["never"][key]) for key in module.FIGURES)
    document, table = write_scores(tmp_path, found, {"step": 3})
    values = json.loads(document.read_text())
    assert values["step"] == 3 and values["per_class"]["never"]["iou"] is None
    assert values["images"][0]["name"] == str(image) and values["confusion"] == found.confusion
    rows = list(csv.DictReader(table.open()))
    assert [(row["image"], row["class"]) for row in rows[3:]] == [("overall", name) for name in (*NAMES, "never")]
    assert rows[1]["boundary_f1"] == "1.000000" and rows[2]["iou"] == "" and rows[0]["pixels"] == "600"


def test_sections_of_a_stack_are_scored_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for z in range(2):
        write(tmp_path / "in" / f"s{z}.tif", rng.integers(0, 255, (20, 20), np.uint8))
        write(tmp_path / "truth" / f"s{z}.tif", np.full((20, 20), z, np.uint8))
    labels = write(tmp_path / "out.tif", np.zeros((2, 20, 20), np.uint8))
    checked = read_truth([tmp_path / "in"], [tmp_path / "truth"], class_names=NAMES, ignore_label=None)
    sections = [(str(tmp_path / "in" / f"s{z}.tif"), "") for z in range(2)]
    found = score([Predicted(sections, labels)], checked)
    assert [image.mean_iou for image in found.images] == [1, 0]


def test_what_the_model_was_trained_on_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    known = write(tmp_path / "in" / "known.tif", rng.integers(0, 255, (4, 20, 20), np.uint8))
    other = write(tmp_path / "in" / "other.tif", rng.integers(0, 255, (4, 20, 20), np.uint8))
    for name in ("known", "other"):
        write(tmp_path / "truth" / f"{name}.tif", np.zeros((4, 20, 20), np.uint8))
    run = run_dir.create(tmp_path / "run")
    run.write_config(RunConfig(), "finetune")
    ingest([known], run.data)
    weights = run.checkpoint(3) / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    moved = known.rename(tmp_path / "in" / "moved.tif")  # its content is what counts
    (tmp_path / "truth" / "known.tif").rename(tmp_path / "truth" / "moved.tif")
    pairs = {p.image.info.name: p for p in pair_labels([tmp_path / "in"], [tmp_path / "truth"]).pairs}
    run.environment.write_text("{}")
    unsplit = TrainedOn.of_weights(weights)
    assert unsplit is not None and unsplit.sections_of(pairs["moved"]) == (f"{moved} (trained on or held out)",)
    assert unsplit.sections_of(pairs["other"]) == () and other.exists()
    run.environment.write_text(json.dumps({"split": {"train": [["known", 0, 3, None, None]], "val": []}}))
    trained = TrainedOn.of_weights(weights)
    assert trained is not None and trained.sections_of(pairs["moved"]) == (f"{moved} sections 0 to 2",)
    assert TrainedOn.of_weights(tmp_path / "w.safetensors") is None
    checked = read_truth([tmp_path / "in"], [tmp_path / "truth"], class_names=NAMES, ignore_label=None)
    found = score([predicted(moved, tmp_path / "truth" / "moved.tif")], checked, trained)
    assert found.trained_on == [f"{moved} sections 0 to 2"]


def test_foreign_label_values_are_refused_before_predicting(files: tuple[Path, Path, Path]) -> None:
    with pytest.raises(InputError, match="9"):
        read_truth([files[0]], [files[1]], class_names=NAMES, ignore_label=None)


def test_a_prediction_of_another_size_is_refused(files: tuple[Path, Path, Path]) -> None:
    image, truth, labels = files
    write(labels, np.zeros((2, 4, 4), np.uint8))
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    with pytest.raises(InputError, match=r"\(2, 4, 4\)"):
        score([predicted(image, labels)], checked)


def test_a_prediction_without_truth_is_refused(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, truth, labels = files
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    with pytest.raises(InputError, match="no labels"):
        score([predicted(tmp_path / "other.tif", labels)], checked)
