"""Labels: pairing by name and count, every form they come in, and every problem listed at once."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from affmae_engine.data.labels.checks import CheckedLabels, check_labels
from affmae_engine.data.labels.gather import gather_labels
from affmae_engine.data.labels.pairing import LabelledImage, joined, pair_labels
from affmae_engine.errors import ConfigError, InputError

SHAPE = (24, 20)
ALL = slice(None)


def save(path: Path, array: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array, photometric="minisblack")
    return array


def grey(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def classes(seed: int, shape: tuple[int, ...] = SHAPE, count: int = 3) -> np.ndarray:
    return np.random.default_rng(100 + seed).integers(0, count, shape, dtype=np.uint8)


def read(pair: LabelledImage) -> np.ndarray:
    return pair.labels.read(ALL, ALL, ALL)


def check(images: Path, labels: Path, **options: object) -> CheckedLabels:
    return check_labels(pair_labels([images], [labels]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image_name", "label_name"),
    [
        ("a{}.png", "a{}.tif"),
        ("a{}.tif", "a{}_label.png"),
        ("a{}.tif", "a{}-labels.tif"),
        ("a{}.tif", "A{}_mask.tif"),
        ("a{}.tif", "label_a{}.tif"),
        ("image{}.tif", "mask{}.tif"),
        ("a{}_em.tif", "a{}_seg.tif"),
        ("a{}.ome.tif", "a{}.png"),
        ("sub/a{}.tif", "sub/a{}.png"),
        ("é a{}.tif", "é a{}.tif"),
    ],
)
def test_files_are_paired_by_name(tmp_path: Path, image_name: str, label_name: str):
    for k in (1, 2, 10):
        save(tmp_path / "I" / image_name.format(k), grey(k))
        save(tmp_path / "L" / label_name.format(k), classes(k))
    pairing = pair_labels([tmp_path / "I"], [tmp_path / "L"])
    assert [Path(pair.name).name for pair in pairing.pairs] == [Path(image_name.format(k)).name for k in (1, 2, 10)]
    for k, pair in zip((1, 2, 10), pairing.pairs, strict=True):
        np.testing.assert_array_equal(read(pair)[0], classes(k))
        np.testing.assert_array_equal(pair.image.read(ALL, ALL, ALL)[0], grey(k))


def test_one_image_and_one_label_need_no_common_name(tmp_path: Path):
    save(tmp_path / "volume.tif", grey(0, (4, *SHAPE)))
    truth = save(tmp_path / "truth.tif", classes(0, (4, *SHAPE)))
    checked = check(tmp_path / "volume.tif", tmp_path / "truth.tif")
    np.testing.assert_array_equal(read(checked.pairs[0]), truth)
    assert checked.class_names == ("class0", "class1", "class2")
    assert checked.counts == tuple(np.bincount(truth.ravel()).tolist())


def test_a_stack_and_pictures_are_paired_by_order_when_counts_match(tmp_path: Path):
    stack = save(tmp_path / "stack.tif", classes(0, (3, *SHAPE)))
    for z in range(3):
        save(tmp_path / "P" / f"z{z + 8}.png", stack[z])
    as_labels = pair_labels([tmp_path / "stack.tif"], [tmp_path / "P"])
    np.testing.assert_array_equal(read(as_labels.pairs[0]), stack)
    as_images = pair_labels([tmp_path / "P"], [tmp_path / "stack.tif"])
    assert len(as_images.pairs) == 3
    np.testing.assert_array_equal(np.concatenate([read(pair) for pair in as_images.pairs]), stack)
    assert "order of their names" in as_labels.notes[-1]
    save(tmp_path / "P" / "z99.png", stack[0])
    with pytest.raises(InputError, match="no labels of that name") as error:
        pair_labels([tmp_path / "stack.tif"], [tmp_path / "P"])
    assert error.value.message.count("labels without an image") == 4


@pytest.mark.parametrize("first", [0, 1])
def test_pictures_of_some_sections_label_these(tmp_path: Path, first: int):
    truth = classes(0, (6, *SHAPE))
    save(tmp_path / "vol.tif", grey(0, (6, *SHAPE)))
    for z in (1, 5):
        save(tmp_path / "P" / f"vol_z{z + first:03}_mask.png", truth[z])
    checked = check(tmp_path / "vol.tif", tmp_path / "P")
    labels = read(checked.pairs[0])
    assert checked.ignore_label == 255 and checked.ignored == 4 * 480
    for z in range(6):
        np.testing.assert_array_equal(labels[z], truth[z] if z in (1, 5) else np.full(SHAPE, 255))
    assert checked.counts == tuple(np.bincount(truth[[1, 5]].ravel()).tolist())


@pytest.mark.parametrize(
    ("image_name", "label_name"),
    [
        ("img_{}.tif", "img_{}_masks.tif"),
        ("a{}.png", "a{}_cp_masks.png"),
        ("a{}.png", "a{}_seg.png"),
        ("a{}.png", "a{}-labels.png"),
        ("case_{}_0000.png", "case_{}.png"),
        ("s{:03}.png", "s{}_labels.tif"),
    ],
)
def test_names_of_other_tools_are_known(tmp_path: Path, image_name: str, label_name: str):
    for k in (1, 2, 10):
        save(tmp_path / "I" / image_name.format(k), grey(k))
        save(tmp_path / "L" / label_name.format(k), classes(k))
    pairs = pair_labels([tmp_path / "I"], [tmp_path / "L"]).pairs
    for k, pair in zip((1, 2, 10), pairs, strict=True):
        assert Path(pair.name).name == image_name.format(k)
        np.testing.assert_array_equal(read(pair)[0], classes(k))


@pytest.mark.parametrize("labels", ["*_masks.tif", ""])
def test_images_and_labels_may_lie_in_one_folder(tmp_path: Path, labels: str):
    for k in range(3):
        save(tmp_path / f"img_{k}.tif", grey(k))
        save(tmp_path / f"img_{k}_masks.tif", classes(k))
    pairs = pair_labels([tmp_path], [f"{tmp_path}/{labels}" if labels else tmp_path]).pairs
    assert [Path(pair.name).name for pair in pairs] == [f"img_{k}.tif" for k in range(3)]
    np.testing.assert_array_equal(read(pairs[2])[0], classes(2))


def test_what_is_no_image_is_no_image_without_labels(tmp_path: Path):
    for k in range(2):
        save(tmp_path / f"a{k}.tif", grey(k))
        save(tmp_path / f"a{k}_overlay.png", grey(9))
        save(tmp_path / "labels" / f"a{k}.png", classes(k))
    found = gather_labels([tmp_path], [tmp_path / "labels"])
    assert len(found.checked.pairs) == 2 and not found.left_out
    assert any("2 overlays, 2 label maps" in note for note in found.notes)


def test_images_without_labels_are_left_out_and_named(tmp_path: Path):
    for k in range(5):
        save(tmp_path / "I" / f"a{k}.tif", grey(k))
    for k in (1, 3):
        save(tmp_path / "L" / f"a{k}.png", classes(k))
    found = gather_labels([tmp_path / "I"], [tmp_path / "L"])
    assert [path.name for path in found.left_out] == ["a0.tif", "a2.tif", "a4.tif"]
    assert len(found.checked.pairs) == 2
    assert "3 of 5 images have no labels and are left out (a0.tif, a2.tif, a4.tif)" in found.notes[0]


def test_a_label_map_in_a_zarr_labels_a_folder_of_pictures(tmp_path: Path):
    stack = classes(0, (3, *SHAPE))
    group = zarr.create_group(tmp_path / "L.zarr")
    group.create_array("0", data=stack)
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]}
    images = [{"axes": [{"name": axis} for axis in "zyx"], "datasets": [level]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": images, "image-label": {}}
    for z in range(3):
        save(tmp_path / "P" / f"z{z + 8}.png", grey(z))
    pairing = pair_labels([tmp_path / "P"], [tmp_path / "L.zarr"])
    np.testing.assert_array_equal(np.concatenate([read(pair) for pair in pairing.pairs]), stack)


def test_image_and_labels_in_one_zarr(tmp_path: Path):
    group = zarr.create_group(tmp_path / "cells.zarr")
    image, truth = grey(0, (3, *SHAPE)), classes(0, (3, *SHAPE))
    group.create_array("raw", data=image)
    group.create_array("labels", data=truth)
    (pair,) = pair_labels([tmp_path / "cells.zarr/raw"], [tmp_path / "cells.zarr/labels"]).pairs
    np.testing.assert_array_equal(read(pair), truth)
    np.testing.assert_array_equal(pair.image.read(ALL, ALL, ALL), image)


def test_a_folder_of_masks_for_each_class(tmp_path: Path):
    truth = {k: classes(k) for k in range(2)}
    for k, labels in truth.items():
        save(tmp_path / "I" / f"{k}.tif", grey(k))
        for number, name in ((1, "membrane"), (2, "synapse")):
            save(tmp_path / "L" / name / f"{k}.png", (labels == number).astype(np.uint8) * 255)
    checked = check(tmp_path / "I", tmp_path / "L")
    assert checked.class_names == ("background", "membrane", "synapse")
    for k, pair in enumerate(checked.pairs):
        np.testing.assert_array_equal(read(pair)[0], truth[k])
    swapped = check(tmp_path / "I", tmp_path / "L", class_names=("none", "synapse", "membrane"))
    np.testing.assert_array_equal(read(swapped.pairs[1])[0], np.array([0, 2, 1])[truth[1]])
    assert swapped.class_names == ("none", "synapse", "membrane")
    with pytest.raises(ConfigError, match="membrane, synapse"):
        check(tmp_path / "I", tmp_path / "L", class_names=("membrane", "synapse"))
    (tmp_path / "L" / "synapse" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.tif: no labels of that name in .*synapse"):
        check(tmp_path / "I", tmp_path / "L")


@pytest.mark.parametrize("form", ["pages", "rgb", "imagej"])
def test_a_file_with_one_channel_for_each_class(tmp_path: Path, form: str):
    truth = classes(0, count=4)
    masks = np.stack([truth == k for k in (1, 2, 3)]).astype(np.uint8)
    save(tmp_path / "I" / "a.tif", grey(0))
    (tmp_path / "L").mkdir()
    options = {
        "pages": {"photometric": "minisblack"},
        "rgb": {"photometric": "rgb", "planarconfig": "separate"},
        "imagej": {"imagej": True, "metadata": {"axes": "CYX"}},
    }[form]
    tifffile.imwrite(tmp_path / "L" / "a.tif", masks, **options)
    checked = check(tmp_path / "I", tmp_path / "L")
    np.testing.assert_array_equal(read(checked.pairs[0])[0], truth)
    assert checked.class_names == ("background", "mask1", "mask2", "mask3")


def test_overlapping_masks_are_counted_and_the_later_wins(tmp_path: Path):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:10] = 1
    save(tmp_path / "I" / "a.tif", grey(0))
    save(tmp_path / "L" / "a" / "a.png", mask)
    save(tmp_path / "L" / "b" / "a.png", np.roll(mask, 5, axis=0))
    checked = check(tmp_path / "I", tmp_path / "L")
    assert checked.counts == (9 * 20, 5 * 20, 10 * 20)
    assert any("100 pixels lie in several masks" in note for note in checked.notes)


def test_a_mask_that_is_not_binary_is_refused(tmp_path: Path):
    save(tmp_path / "I" / "a.tif", grey(0))
    save(tmp_path / "L" / "a" / "a.png", classes(0))
    save(tmp_path / "L" / "b" / "a.png", classes(1) * 0)
    with pytest.raises(InputError, match=r"a\.png holds the values 0, 1, 2; a binary mask"):
        check(tmp_path / "I", tmp_path / "L")


def test_a_grey_map_saved_as_colour_is_a_map(tmp_path: Path):
    truth = classes(0)
    save(tmp_path / "a.tif", grey(0))
    tifffile.imwrite(tmp_path / "l.tif", np.stack([truth] * 3, axis=-1), photometric="rgb")
    np.testing.assert_array_equal(read(check(tmp_path / "a.tif", tmp_path / "l.tif").pairs[0])[0], truth)


def save_colour(path: Path, channels: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.stack(channels, axis=-1), photometric="rgb")


@pytest.mark.parametrize("empty", [[2], [0, 2, 3], [1, 2]])
def test_a_map_saved_as_colour_is_told_by_any_section(tmp_path: Path, empty: list[int]):
    truth = classes(0, (4, *SHAPE), count=2)
    truth[empty] = 0
    save(tmp_path / "a.tif", grey(0, (4, *SHAPE)))
    save_colour(tmp_path / "l.tif", [truth] * 3)
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif", unlabeled_sections="background")
    assert checked.class_names == ("class0", "class1")
    np.testing.assert_array_equal(read(checked.pairs[0]), truth)
    masks = [truth * (np.arange(4) == k)[:, None, None].astype(np.uint8) for k in (3, 1, 0)]
    save_colour(tmp_path / "l.tif", masks)
    assert len(check(tmp_path / "a.tif", tmp_path / "l.tif").class_names) == 4


@pytest.mark.parametrize("form", ["map", "masks", "four masks"])
def test_empty_labels_take_the_form_of_the_others(tmp_path: Path, form: str):
    for k in range(3):
        save(tmp_path / "I" / f"{k}.tif", grey(k))
        truth = classes(k, count=2) * np.uint8(255 * (k != 1))
        other = np.zeros_like(truth)
        if form == "four masks" and k != 1:
            save(tmp_path / "L" / f"{k}.tif", np.stack([truth, other, other, other]))
        else:
            save_colour(tmp_path / "L" / f"{k}.tif", [truth] * 3 if form == "map" else [truth, other, other])
    checked = check(tmp_path / "I", tmp_path / "L")
    assert len(checked.class_names) == {"map": 2, "masks": 4, "four masks": 5}[form]
    assert len(checked.pairs) == 3 and not read(checked.pairs[1]).any()
    np.testing.assert_array_equal(read(checked.pairs[0])[0], classes(0, count=2))


def test_masks_whose_first_channels_are_empty_stay_masks(tmp_path: Path):
    save(tmp_path / "a.tif", grey(0))
    masks = np.zeros((4, *SHAPE), np.uint8)
    masks[3, :5] = 1
    save(tmp_path / "l.tif", masks)
    with pytest.raises(InputError, match="nothing to tell apart"):  # maps without a single value
        save_colour(tmp_path / "empty.tif", [masks[0]] * 3)
        check(tmp_path / "a.tif", tmp_path / "empty.tif")
    tifffile.imwrite(tmp_path / "l.tif", masks, imagej=True, metadata={"axes": "CYX"})
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif")
    assert len(checked.class_names) == 5 and checked.counts[4] == 5 * SHAPE[1]


@pytest.mark.parametrize("value", [1, 255, 7])
def test_binary_masks_become_classes_0_and_1(tmp_path: Path, value: int):
    truth = classes(0, count=2)
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.png", truth * np.uint8(value))
    checked = check(tmp_path / "a.tif", tmp_path / "l.png")
    np.testing.assert_array_equal(read(checked.pairs[0])[0], truth)
    assert checked.class_names == ("class0", "class1")
    assert checked.counts == tuple(np.bincount(truth.ravel()).tolist())
    assert any("taken as classes" in note for note in checked.notes) == (value != 1)


def test_as_many_names_as_values_number_them(tmp_path: Path):
    truth = classes(0)
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.png", np.array([0, 128, 255], np.uint8)[truth])
    with pytest.raises(InputError, match="without a gap") as error:
        check(tmp_path / "a.tif", tmp_path / "l.png")
    assert "name these 3 classes in this order with --classes" in error.value.hint
    checked = check(tmp_path / "a.tif", tmp_path / "l.png", class_names=("rest", "myelin", "axon"))
    np.testing.assert_array_equal(read(checked.pairs[0])[0], truth)
    assert any("128 as 1, 255 as 2" in note for note in checked.notes)
    save(tmp_path / "l.png", np.array([0, 1, 255], np.uint8)[truth])
    with pytest.raises(InputError, match="value 255: "):
        check(tmp_path / "a.tif", tmp_path / "l.png", class_names=("rest", "myelin", "axon"))


def test_the_ignore_label_is_no_class(tmp_path: Path):
    labels = classes(0)
    labels[:3] = 255
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.png", labels)
    checked = check(tmp_path / "a.tif", tmp_path / "l.png", ignore_label=255)
    assert (len(checked.class_names), checked.ignored) == (3, 60)
    np.testing.assert_array_equal(read(checked.pairs[0])[0], labels)
    with pytest.raises(InputError, match="value 255: 60 pixels") as error:
        check(tmp_path / "a.tif", tmp_path / "l.png")
    assert "finetune.ignore_label=255" in error.value.hint


def test_values_out_of_range_are_listed_for_all_files(tmp_path: Path):
    for k in range(3):
        save(tmp_path / "I" / f"{k}.tif", grey(k))
        labels = classes(k)
        labels[0, :k] = 7
        save(tmp_path / "L" / f"{k}.tif", labels)
    with pytest.raises(InputError, match=r"value 7: 3 pixels in .*1\.tif, .*2\.tif is no class \(0 to 2\)"):
        check(tmp_path / "I", tmp_path / "L", class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="without a gap"):
        check(tmp_path / "I", tmp_path / "L")
    named = check(tmp_path / "I", tmp_path / "L", class_names=tuple("abcdefgh"))
    assert any("no pixel is labelled d, e, f, g" in note for note in named.notes)


def test_missing_partners_are_all_listed(tmp_path: Path):
    for k in range(4):
        save(tmp_path / "I" / f"a{k}.tif", grey(k))
    for k in (1, 8, 9):
        save(tmp_path / "L" / f"a{k}.png", classes(k))
    with pytest.raises(InputError) as error:
        check(tmp_path / "I", tmp_path / "L")
    text = error.value.message
    assert all(f"a{k}.tif: no labels" in text for k in (0, 2, 3))
    assert all(f"a{k}.png: labels without an image" in text for k in (8, 9))
    assert "5 problems" in text


def test_shape_mismatches_are_all_listed(tmp_path: Path):
    for k, shape in enumerate([SHAPE, (20, 24), (12, 10)]):
        save(tmp_path / "I" / f"{k}.tif", grey(k))
        save(tmp_path / "L" / f"{k}.tif", classes(k, shape))
    with pytest.raises(InputError) as error:
        check(tmp_path / "I", tmp_path / "L")
    assert "1.tif is 24 x 20" in error.value.message
    assert "2.tif are 12 x 10" in error.value.message
    assert "0.tif" not in error.value.message


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    for suffix in ("tif", "tiff"):
        save(tmp_path / "I" / f"a.{suffix}", grey(0))
    save(tmp_path / "L" / "a.tif", classes(0))
    with pytest.raises(InputError, match="several files are called a"):
        pair_labels([tmp_path / "I"], [tmp_path / "L"])


def discs(shape: tuple[int, int] = (96, 96), spacing: int = 16) -> np.ndarray:
    """Numbered discs on background 0."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    number = 1 + y // spacing * (shape[1] // spacing) + x // spacing
    inside = np.hypot(y % spacing - spacing / 2, x % spacing - spacing / 2) < spacing / 3
    return np.where(inside, number, 0).astype(np.uint8)


def blurred(mask: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(((mask > 0) * 255).astype(np.uint8)).resize((77, 77), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize(mask.shape, Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("labels", "sentence", "hint"),
    [
        ("copy", "the labels equal their images", "--labels"),
        ("image", "look like gray images", "--labels"),
        ("instances", "instance ids, not classes: each of 37 values", "--classes background,cell"),
        ("blurred", "interpolated: between their classes they have values in", "nearest neighbor"),
        ("jpeg", "these labels are JPEG, which smears their values (", "PNG or TIFF"),
    ],
)
def test_labels_that_are_no_classes_are_refused_by_cause(tmp_path: Path, labels: str, sentence: str, hint: str):
    arrays = {
        "image": grey(9, (96, 96)),
        "instances": discs(),
        "blurred": blurred(discs(spacing=48)),
        "copy": grey(0, (96, 96)),
    }
    for k in range(3):
        save(tmp_path / "I" / f"{k}.png", grey(0, (96, 96)))
        if labels == "jpeg":
            (tmp_path / "L").mkdir(exist_ok=True)
            Image.fromarray((discs() > 0) * np.uint8(255)).save(tmp_path / "L" / f"{k}.jpg", quality=80)
        else:
            save(tmp_path / "L" / f"{k}.png", arrays[labels])
    with pytest.raises(InputError) as error:
        check(tmp_path / "I", tmp_path / "L")
    assert sentence in error.value.message and hint in error.value.hint and "\n" not in error.value.message


def test_two_names_make_instance_ids_background_and_foreground(tmp_path: Path):
    save(tmp_path / "a.tif", grey(0, (96, 96)))
    save(tmp_path / "l.tif", discs().astype(np.uint16) * 900)
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif", class_names=("background", "cell"))
    np.testing.assert_array_equal(read(checked.pairs[0])[0], discs() > 0)
    assert checked.counts == tuple(np.bincount((discs() > 0).ravel()).tolist())


def test_swapped_options_are_recognized(tmp_path: Path):
    for k in range(2):
        save(tmp_path / "I" / f"{k}.png", grey(k, (96, 96)))
        save(tmp_path / "L" / f"{k}.png", (discs() > 0).astype(np.uint8))
    with pytest.raises(InputError, match="--images and --labels are swapped") as error:
        check(tmp_path / "L", tmp_path / "I")
    assert "\n" not in error.value.message


@pytest.mark.parametrize("form", ["png", "tif"])
def test_colors_are_offered_as_classes_and_numbered_as_told(tmp_path: Path, form: str):
    colors = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 0]], np.uint8)
    truth = (discs() > 0).astype(np.uint8) + (discs() > 20)
    for k in range(2):
        save(tmp_path / "I" / f"{k}.tif", grey(k, (96, 96)))
        (tmp_path / "L").mkdir(exist_ok=True)
        drawn = colors[truth if k else truth * 0]  # one section has no color at all
        if form == "png":
            Image.fromarray(drawn).save(tmp_path / "L" / f"{k}.png")
        else:
            tifffile.imwrite(tmp_path / "L" / f"{k}.tif", drawn, photometric="rgb")
    with pytest.raises(InputError, match="drawn in RGB colors: 000000 ") as error:
        check(tmp_path / "I", tmp_path / "L")
    offered = error.value.hint.split("--label-colors ")[1]
    assert set(offered.split(",")) == {"000000", "ff0000", "ffff00"}
    mapping = ["000000", "ff0000", "#FFFF00"]
    checked = check(tmp_path / "I", tmp_path / "L", colors=mapping, unlabeled_sections="background")
    np.testing.assert_array_equal(read(checked.pairs[1])[0], truth)
    assert not read(checked.pairs[0]).any()
    with pytest.raises(InputError, match="does not name"):
        check(tmp_path / "I", tmp_path / "L", colors=mapping[:2])
    with pytest.raises(ConfigError, match="not hexadecimal"):
        check(tmp_path / "I", tmp_path / "L", colors=["red", "blue"])


def test_minus_one_is_ignored(tmp_path: Path):
    truth = classes(0).astype(np.int32)
    truth[:3] = -1
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.tif", truth)
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif")
    assert (checked.class_names, checked.ignore_label) == (("class0", "class1", "class2"), 255)
    np.testing.assert_array_equal(read(checked.pairs[0])[0], np.where(truth < 0, 255, truth))
    assert checked.ignored == 60


@pytest.mark.parametrize(("labeled", "ignored"), [(1, True), (4, False)])
def test_sections_without_foreground_are_questioned(tmp_path: Path, labeled: int, ignored: bool):
    truth = classes(0, (6, *SHAPE))
    truth[labeled:] = 0
    save(tmp_path / "a.tif", grey(0, (6, *SHAPE)))
    save(tmp_path / "l.tif", truth)
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif")
    assert f"{6 - labeled} of 6 sections have no label at all" in checked.warnings[0]
    assert checked.ignored == (480 * (6 - labeled) if ignored else 0)
    for choice in ("ignore", "background"):
        told = check(tmp_path / "a.tif", tmp_path / "l.tif", unlabeled_sections=choice)
        assert told.warnings == () and (told.ignored > 0) == (choice == "ignore")
        assert (read(told.pairs[0])[labeled:] == (255 if choice == "ignore" else 0)).all()
        assert sum(told.counts) + told.ignored == truth.size


def test_an_image_that_exif_turns_needs_labels_that_it_turns(tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 3  # upside down: the shape stays the same
    picture = Image.fromarray(grey(0))
    picture.save(tmp_path / "a.jpg", exif=exif)
    save(tmp_path / "l.png", classes(0))
    with pytest.raises(InputError, match="turned by an EXIF orientation"):
        check(tmp_path / "a.jpg", tmp_path / "l.png")


def test_padding_is_ignored_in_labels(tmp_path: Path):
    image = np.random.default_rng(0).integers(60, 200, (2, 96, 96), dtype=np.uint8)
    image[1, :, :20] = np.random.default_rng(1).integers(0, 4, (96, 20))
    truth = classes(0, (2, 96, 96))
    save(tmp_path / "a.tif", image)
    save(tmp_path / "l.tif", truth)
    checked = check(tmp_path / "a.tif", tmp_path / "l.tif")
    labels = read(checked.pairs[0])
    assert checked.ignored == 96 * 20 and (labels[1, :, :20] == 255).all()
    np.testing.assert_array_equal(labels[1, :, 20:], truth[1, :, 20:])
    np.testing.assert_array_equal(labels[0], truth[0])


def test_values_that_are_no_numbers_of_classes_are_refused_together(tmp_path: Path):
    save(tmp_path / "I" / "floats.tif", grey(2))
    save(tmp_path / "L" / "floats.tif", np.full(SHAPE, 0.5, np.float32))
    save(tmp_path / "I" / "negative.tif", grey(3))
    save(tmp_path / "L" / "negative.tif", np.full(SHAPE, -2, np.int16))
    save(tmp_path / "I" / "broken.tif", grey(4))
    (tmp_path / "L" / "broken.tif").write_bytes(b"II*\x00 no more")
    with pytest.raises(InputError, match=r"broken\.tif"):
        check(tmp_path / "I", tmp_path / "L")
    save(tmp_path / "L" / "broken.tif", classes(4))
    with pytest.raises(InputError) as error:
        check(tmp_path / "I", tmp_path / "L")
    assert "not whole numbers" in error.value.message and "numbers below -1" in error.value.message


def test_whole_floats_are_labels(tmp_path: Path):
    truth = classes(0)
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.tif", truth.astype(np.float32))
    np.testing.assert_array_equal(read(check(tmp_path / "a.tif", tmp_path / "l.tif").pairs[0])[0], truth)


def test_one_value_only_is_refused(tmp_path: Path):
    save(tmp_path / "a.tif", grey(0))
    save(tmp_path / "l.tif", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match="all 480 pixels have the value 0"):
        check(tmp_path / "a.tif", tmp_path / "l.tif")


def test_an_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "I").mkdir()
    save(tmp_path / "l.tif", classes(0))
    with pytest.raises(InputError, match="no images found"):
        pair_labels([tmp_path / "I"], [tmp_path / "l.tif"])


def test_training_and_validation_sets_are_numbered_together(tmp_path: Path):
    for part, values in (("t", (0, 255)), ("v", (0, 0))):
        save(tmp_path / f"{part}.tif", grey(0))
        save(tmp_path / f"{part}l.tif", np.resize(np.array(values, np.uint8), SHAPE))
    both = joined(*(pair_labels([tmp_path / f"{p}.tif"], [tmp_path / f"{p}l.tif"]) for p in "tv"))
    checked = check_labels(both)
    assert read(checked.pairs[0]).max() == 1
    assert read(checked.pairs[1]).max() == 0


def test_composed_sources_survive_pickling_and_partial_reads(tmp_path: Path):
    truth = classes(0, (3, *SHAPE))
    save(tmp_path / "I" / "a.tif", grey(0, (3, *SHAPE)))
    for number in (1, 2):
        save(tmp_path / "L" / f"m{number}" / "a.tif", (truth == number).astype(np.uint8))
    labels = check(tmp_path / "I", tmp_path / "L").pairs[0].labels
    copy = pickle.loads(pickle.dumps(labels))  # noqa: S301 (our own bytes: worker processes get sources this way)
    np.testing.assert_array_equal(copy.read(slice(1, 2), slice(4, 9), slice(15, 99)), truth[1:2, 4:9, 15:])


@pytest.mark.slow
def test_real_labels_of_two_kinds(shared_data: Path):
    vnc = check(shared_data / "em/vnc/stack1/image", shared_data / "em/vnc/stack1/label")
    assert len(vnc.class_names) == 5
    assert vnc.counts[4] / sum(vnc.counts) == pytest.approx(0.0056, abs=3e-4)
    with pytest.raises(InputError, match="instance ids"):
        check(shared_data / "em/fib25/sample2/image", shared_data / "em/fib25/sample2/instances.tif")
