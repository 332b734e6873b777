"""docs/settings.md is what the fields of the configuration say."""

from pathlib import Path

import pytest

from affmae_engine.config import FIELDS
from affmae_engine.settings_page import page

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"
ROWS = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}


def test_the_page_in_the_docs_is_up_to_date() -> None:
    assert DOCS.read_text("utf-8") == page(), "run: python -m affmae_engine.settings_page > docs/settings.md"


def test_every_setting_has_a_row_with_a_meaning() -> None:
    assert list(ROWS) == list(FIELDS)
    assert all(len(row.split(" | ")) == 6 and len(row.split(" | ")[5]) > 10 for row in ROWS.values())


@pytest.mark.parametrize(
    ("path", "cells"),
    [
        ("optim.lr", ["`0.00035`", "-", "number > 0", "kept"]),
        ("train.epochs", ["not set", "epochs", "number > 0 or `none`", "free"]),
        ("train.micro_batch", ["not set", "images", "integer > 0 or `auto` or `none`", "changes rounding"]),
        ("model.depths", ["not set", "blocks", "4 values, each integer > 0 or `none`", "kept"]),
        ("optim.betas", ["`[0.883, 0.935]`", "-", "2 values, each number ≥ 0, < 1", "kept"]),
        ("mask.lattices", ["`[8, 4, 8, 8]`", "cells", "list, each integer > 0", "kept"]),
        ("model.patch_size", ["`8`", "pixels", "`2`, `4`, `8`, `16`, `32`", "kept"]),
        ("finetune.class_names", ["`[]`", "-", "list, each text", "kept"]),
    ],
)
def test_a_row_has_default_unit_values_and_policy(path: str, cells: list[str]) -> None:
    assert ROWS[path].split(" | ")[1:5] == cells
