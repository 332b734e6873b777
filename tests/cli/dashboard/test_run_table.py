"""The table of runs: columns hold what they must, and a long name gives way where the room is small."""

import pytest

from affmae_cli.dashboard.run_table import COLUMNS, NAME, widths

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
