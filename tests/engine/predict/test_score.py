"""Scores of predictions against labels drawn by hand."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from affmae_engine.errors import InputError
from affmae_engine.predict.score import read_truth, score
from affmae_engine.predict.stream import PredictReport

NAMES = ("background", "membrane")


def report(source: Path, labels: Path, shape: tuple[int, int, int]) -> PredictReport:
    return PredictReport(
        source=source, series="", labels=labels, format="TIFF", shape_ZYX=shape, dtype="uint8",
        pixel_nm=(None, None, None), class_fractions={}, seconds=1.0, megapixels_per_s=1.0, tile=8, rescaled_to=None,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    image, truth, predicted = (tmp_path / name for name in ("a.tif", "a_labels.tif", "out.tif"))
    rng = np.random.default_rng(0)
    tifffile.imwrite(image, rng.integers(0, 255, (2, 4, 5), np.uint8), photometric="minisblack")
    classes = np.zeros((2, 4, 5), np.uint8)
    classes[0, :2] = 1
    classes[1, 3] = 9
    tifffile.imwrite(truth, classes, photometric="minisblack")
    guess = np.zeros((2, 4, 5), np.uint8)
    guess[0, 0] = 1
    guess[1, 3] = 1
    tifffile.imwrite(predicted, guess, photometric="minisblack")
    return image, truth, predicted


def test_counts_every_pixel_but_the_ignored(files: tuple[Path, Path, Path]) -> None:
    image, truth, predicted = files
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    found = score([report(image, predicted, (2, 4, 5))], checked)
    # membrane: 5 of 10 found, none wrong (the wrong ones are ignored); background: 25 right, 5 too many
    assert found.per_class["membrane"]["iou"] == pytest.approx(5 / 10)
    assert found.per_class["background"]["iou"] == pytest.approx(25 / 30)
    assert found.per_class["membrane"]["dice"] == pytest.approx(2 * 5 / 15)
    assert found.mean_iou == pytest.approx((5 / 10 + 25 / 30) / 2)
    assert list(found.per_image.values()) == [pytest.approx(found.mean_iou)]


def test_foreign_label_values_are_refused_before_predicting(files: tuple[Path, Path, Path]) -> None:
    with pytest.raises(InputError, match="9"):
        read_truth([files[0]], [files[1]], class_names=NAMES, ignore_label=None)


def test_a_prediction_of_another_size_is_refused(files: tuple[Path, Path, Path]) -> None:
    image, truth, predicted = files
    tifffile.imwrite(predicted, np.zeros((2, 4, 4), np.uint8), photometric="minisblack")
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    with pytest.raises(InputError, match=r"\(2, 4, 4\)"):
        score([report(image, predicted, (2, 4, 4))], checked)


def test_a_prediction_without_truth_is_refused(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, truth, predicted = files
    checked = read_truth([image], [truth], class_names=NAMES, ignore_label=9)
    with pytest.raises(InputError, match="no labels"):
        score([report(tmp_path / "other.tif", predicted, (2, 4, 5))], checked)
