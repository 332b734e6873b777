"""IoU and Dice per class as a table, of one prediction or of several beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from affmae_cli import output

if TYPE_CHECKING:
    from affmae_engine.predict.score import Score

_TITLES = {"iou": "IoU", "dice": "Dice"}


def show_scores(scores: Mapping[str, Score]) -> None:
    """Print one row per class and one for the means: IoU and Dice, or of several entries the IoU under their keys."""
    keys = ("iou", "dice") if len(scores) == 1 else ("iou",)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class")
    for title in scores:
        for key in keys:
            table.add_column(f"{_TITLES[key]} {title}".strip(), justify="right")
    first = next(iter(scores.values()))
    table.add_column("share of truth", justify="right")
    pixels = sum(figures["pixels"] for figures in first.per_class.values())
    for name, figures in first.per_class.items():
        row = [Text(output.printable(name))]
        for score in scores.values():
            row += [_figure(score.per_class[name][key]) for key in keys]
        table.add_row(*row, Text(f"{figures['pixels'] / max(pixels, 1):.2%}"))
    means = [_figure(getattr(score, f"mean_{key}")) for score in scores.values() for key in keys]
    table.add_row(Text("mean"), *means, Text(), style="bold")
    output.show(table)


def _figure(value: float) -> Text:
    return Text("-" if math.isnan(value) else f"{value:.3f}")
