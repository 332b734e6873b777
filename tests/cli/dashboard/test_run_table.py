"""The table of runs: columns hold what they must, and a long name gives way where the room is small."""

import time
from pathlib import Path

import pytest

from affmae_cli.dashboard.run_table import COLUMNS, NAME, fitted, widths
from affmae_cli.dashboard.runs import RunRow
from affmae_cli.dashboard.status import Status

ROWS = [
    ("✔ finished", "mito-" * 12, "pretrain", "1,000,000 of 1,000,000", "0.1234", "0.1111", "812", "3d04h"),
    ("● running", "short", "finetune", "2 of 4", "-", "-", "-", "1s"),
]


@pytest.mark.parametrize("room", [77, 117, 197])
def test_the_columns_fit_the_room_and_hold_their_text(room: int) -> None:
    wide = widths(ROWS, room, 2)
    columns = zip([column.title for column in COLUMNS], *ROWS, strict=True)
    wanted = [max(map(len, texts)) for texts in columns]
    assert [w for i, w in enumerate(wide) if i != NAME] == [w for i, w in enumerate(wanted) if i != NAME]
    assert wide[NAME] == max(12, min(60, room - sum(w for i, w in enumerate(wanted) if i != NAME) - 2 * len(COLUMNS)))


def test_without_rows_the_titles_fit() -> None:
    assert widths([], 100, 2) == [len(column.title) for column in COLUMNS]


@pytest.mark.parametrize(("room", "step"), [(77, "1M/1M"), (117, "1,000,000 of 1,000,000")])
def test_steps_are_written_short_only_where_the_room_is_small(room: int, step: str) -> None:
    status = Status("finished", "")
    last = time.time() - 275_000
    row = RunRow(Path("runs/pretrain-base"), "pretrain", status, 1_000_000, 1_000_000, 0.1234, 0.1111, 812.0, last)
    (texts,), wide = fitted([row], room, 2)
    assert texts[3] == step and texts[-1] == "3d04h"
    assert sum(wide) + 2 * len(wide) <= room
    assert all(len(text) <= width for text, width in zip(texts, wide, strict=True))
