"""What file names say of labels, predictions and the image that they belong to."""

from pathlib import Path

import pytest

from affmae_engine.data.names import Parsed, folder_role, last_number, parse, without_padding


@pytest.mark.parametrize(
    ("name", "bare", "role"),
    [
        ("cell.tif", "cell", ""),
        ("cell_masks.tif", "cell", "label map"),
        ("cell_cp_masks.png", "cell", "label map"),
        ("Cell-labels.ome.tif", "cell", "label map"),
        ("train_mask_0.png", "train_0", "label map"),
        ("train_image_0.png", "train_0", ""),
        ("label_cell.png", "cell", "label map"),
        ("cell-labels-overlay.png", "cell", "overlay"),
        ("cell_em_seg.tif", "cell", "label map"),
        ("cell_probabilities.tif", "cell", "prediction"),
        ("embryo.tif", "embryo", ""),
        ("mask.tif", "mask", ""),
        ("segment7.tif", "segment7", ""),
    ],
)
def test_words_are_taken_from_names(name: str, bare: str, role: str) -> None:
    assert parse(Path(name)) == Parsed(bare, role)  # type: ignore[arg-type]


def test_numbers_and_folders() -> None:
    assert last_number(Path("vol_2_z003_mask.png")) == 3 and last_number(Path("vol.png")) is None
    assert without_padding("a007_b10") == "a7_b10"
    assert folder_role("masks") == "label map" and folder_role("images") == folder_role("masked cells") == ""
