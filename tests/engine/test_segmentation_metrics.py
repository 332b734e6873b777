"""Confusion matrices: known figures, absent classes, ignored pixels, additivity."""

import math

import numpy as np
import pytest

from affmae_engine.data.labels import IGNORE
from affmae_engine.segmentation_metrics import Confusion, mean


def make_confusion(prediction: list[int], truth: list[int], classes: int = 3) -> Confusion:
    confusion = Confusion(classes)
    confusion.add(np.array(prediction), np.array(truth, dtype=np.int16))
    return confusion


def test_known_figures():
    confusion = make_confusion([0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2])
    np.testing.assert_allclose(confusion.iou(), [1 / 2, 2 / 4, 1 / 2])
    np.testing.assert_allclose(confusion.dice(), [2 / 3, 4 / 6, 2 / 3])
    assert confusion.accuracy() == pytest.approx(4 / 6)
    assert confusion.per_class(["a", "b", "c"])["b"] == {"iou": 0.5, "dice": pytest.approx(2 / 3), "pixels": 3.0}


def test_an_absent_class_is_nan_and_left_out_of_the_mean():
    confusion = make_confusion([0, 0, 2, 1], [0, 0, 0, 1])
    iou = confusion.iou()
    assert math.isnan(iou[2])
    assert math.isnan(confusion.dice()[2])
    assert iou[0] == pytest.approx(2 / 3)  # the wrong pixel counts against its true class
    assert mean(iou) == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(mean([]))
    assert math.isnan(mean([math.nan]))


def test_ignored_pixels_are_not_counted():
    confusion = make_confusion([0, 1, 2], [0, IGNORE, IGNORE])
    assert confusion.counts.sum() == 1
    assert confusion.accuracy() == 1.0


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 4, (2, 30, 20)), rng.integers(-1, 4, (2, 30, 20))
    whole, parts = Confusion(4), Confusion(4)
    whole.add(prediction, truth)
    for plane in range(2):
        part = Confusion(4)
        part.add(prediction[plane], truth[plane])
        parts += part
    np.testing.assert_array_equal(whole.counts, parts.counts)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        Confusion(2).add(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="truth holds 0 to 5"):
        make_confusion([0, 1], [0, 5])
