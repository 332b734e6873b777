"""Pictures: right sizes, right colours, odd input, atomic files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affmae_engine import atomic
from affmae_engine.class_colors import PALETTE, class_colour, class_colours
from affmae_engine.errors import ResourceError
from affmae_engine.picture_files import TILES_KEY, save_png
from affmae_engine.visualize import (
    ERROR_COLOUR,
    STAGE_COLOURS,
    ReconstructionRow,
    comparison_picture,
    overlay,
    reconstruction_picture,
    to_grey,
    token_picture,
)


def texture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(height, width)).astype(np.float32)


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(-1).any())


def test_grey_stretch_ignores_outliers_and_nan() -> None:
    image = texture(64, 64)
    image[0, 0], image[0, 1] = 1e6, np.nan
    grey = to_grey(image)
    assert grey.dtype == np.uint8
    assert grey.min() == 0
    assert grey.max() == 255
    assert 100 < np.median(grey) < 155
    assert to_grey(np.full((4, 4), 7, np.uint16)).max() == 0


def test_reconstruction_picture() -> None:
    stages = [np.stack(np.divmod(np.arange(n), 8)[::-1], -1).astype(np.int32) for n in (32, 12, 4, 1)]
    image, mask = texture(64, 64), np.zeros((64, 64), bool)
    mask[:, 32:] = True
    row = ReconstructionRow(image, mask, {"step one": image, "step two": image, "last": image}, stages)
    picture = reconstruction_picture([row, row], patch=8).rgb
    assert picture.dtype == np.uint8
    assert 1560 < picture.shape[1] <= 1600
    assert 500 < picture.shape[0] < 640
    assert all(has(picture, colour) for colour in STAGE_COLOURS)


def test_tokens_are_drawn_where_they_are() -> None:
    cell = np.array([[5, 2]], np.int32)
    empty = np.empty((0, 2), np.int32)
    picture = token_picture(np.zeros((64, 64), np.float32), [cell, empty, empty, cell], patch=8, edge=128)
    assert tuple(picture[2 * 20, 2 * 44]) == STAGE_COLOURS[3]
    assert not picture[:, :64].any()


def test_overlay_colours_classes_and_leaves_the_rest() -> None:
    image = texture(60, 80)
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:60], labels[:, 60:] = 1, 255
    rgb = overlay(image, labels, ["back", "membrane"], alpha=1.0, ignore=255, legend=False)
    grey = np.repeat(to_grey(image)[..., None], 3, -1)
    assert rgb.shape == (60, 80, 3)
    assert np.array_equal(rgb[:, :39], grey[:, :39])
    assert np.array_equal(rgb[:, 61:], grey[:, 61:])
    assert (rgb[:, 41:59] == np.array(PALETTE[0])).all()


def test_overlay_accepts_any_labels_and_many_long_names() -> None:
    labels = np.random.default_rng(0).integers(-5, 60, (50, 50))
    picture = overlay(texture(50, 50), labels, [f"organelle of type {i}" for i in range(40)])
    assert picture.shape[1] == 50 + 16
    assert picture.shape[0] > 40 * 16  # a legend that needs a line per class in so narrow a picture
    assert len({class_colour(i) for i in range(60)}) == 60
    assert class_colours(3).shape == (3, 3)
    assert class_colours(0).shape == (0, 3)


def test_overlay_needs_equal_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        overlay(texture(5, 5), np.zeros((5, 6), int), ["a"])


def test_comparison_marks_errors_only_where_truth_is_known() -> None:
    image = texture(64, 64)
    truth, predicted = np.zeros((64, 64), np.uint8), np.ones((64, 64), np.uint8)
    assert has(comparison_picture([(image, truth, predicted)], ["a", "b"]).rgb[:300], ERROR_COLOUR)
    unknown = np.full((64, 64), 255, np.uint8)
    assert not has(comparison_picture([(image, unknown, predicted)], ["a", "b"], ignore=255).rgb[:300], ERROR_COLOUR)
    assert not has(comparison_picture([(image, truth, truth)], ["a", "b"]).rgb[:300], ERROR_COLOUR)


def test_a_saved_table_says_where_its_tiles_are(tmp_path: Path) -> None:
    image, truth = texture(64, 64), np.zeros((64, 64), np.uint8)
    picture = comparison_picture([(image, truth, truth)] * 2, ["a", "b"])
    save_png(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as saved:
        found = json.loads(saved.text[TILES_KEY])
        whole = np.asarray(saved)
    assert [(tile["title"], tile["row"]) for tile in found["tiles"][:3]] == [("image", 0), ("image", 1), ("truth", 0)]
    left, top, width, height = found["tiles"][0]["box"]
    assert not (whole[top : top + height, left : left + width] == 255).all(axis=-1)[:, 0].all()
    assert (whole[top - 1, left : left + width] == 255).all() and (whole[top : top + height, left - 1] == 255).all()
    assert found["legend"][1] == ["b", list(class_colour(1))]


def test_saved_picture_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = overlay(texture(20, 20), np.zeros((20, 20), int), ["a"])
    save_png(tmp_path / "a.png", rgb)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), rgb)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "fsync_file", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        save_png(tmp_path / "b.png", rgb)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
