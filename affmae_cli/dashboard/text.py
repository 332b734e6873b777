"""Values and names as text for one line of a terminal."""

from __future__ import annotations

import math

from rich.cells import cell_len, set_cell_size

from affmae_cli.output import printable
from affmae_engine.runtime.formatting import duration, number, rate

__all__ = [
    "count",
    "curve_name",
    "cut",
    "duration",
    "gib",
    "label",
    "number",
    "of",
    "one_line",
    "rate",
    "seconds",
    "share",
]

UNKNOWN = "-"
SIGNS = {"waiting": "◌", "running": "●", "stalled": "▲", "finished": "✔", "stopped": "■", "failed": "✖", "gone": "✖"}
"""A sign for each state of a run, besides its word and color."""

_CURVES = {
    "loss": "total loss",
    "last": "all stages",
    "step2": "stages 4 and 3",
    "step1": "stage 4 only",
    "dice": "mean Dice",
    "mean_fill": "filled with the mean",
    "explained": "explained",
    "iou": "mean IoU",
    "iou_per_image": "IoU per image",
    "accuracy": "pixel accuracy",
    "score": "score",
}


def curve_name(name: str) -> str:
    """The name of a loss or metric on screen: supervised decoder steps by the encoder stages that they have seen."""
    return _CURVES.get(name, one_line(name).replace("_", " "))


def one_line(text: str) -> str:
    """`text` with control characters as visible escapes and line ends as spaces."""
    return printable(text).replace("\n", " ")


def label(value: float) -> str:
    """A value beside a curve in about four digits."""
    return f"{value:.4g}" if 1 <= abs(value) < 1e4 else number(value)


def cut(text: str, width: int) -> str:
    """At most `width` cells of `text`, with an ellipsis where something is missing."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 1))}…"


def count(value: float) -> str:
    """A count in five characters at most: 950, 1.5k, 250k, 1.25M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            digits = f"{value / size:.4g}"[:4].rstrip(".") if abs(value) / size < 1000 else f"{value / size:.0f}"
            return digits + unit
    return f"{value:.0f}"


def share(value: float | None) -> str:
    """A share of 1 in percent."""
    return f"{value:.0%}" if value is not None and math.isfinite(value) else UNKNOWN


def gib(value: float) -> str:
    """Memory in GiB with one decimal."""
    return f"{value:.1f} GiB" if math.isfinite(value) else UNKNOWN


def of(value: float, total: float, unit: str, digits: int = 0) -> str:
    """A value and its limit: 310 of 450 W."""
    if not math.isfinite(value):
        return UNKNOWN
    limit = f" of {total:.{digits}f}" if math.isfinite(total) else ""
    return f"{value:.{digits}f}{limit} {unit}"


def seconds(value: float) -> str:
    """The time of a step: 350 ms, 1.25 s."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
