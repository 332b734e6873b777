"""The classes of a segmentation that need a look first. Pure, so that a summary needs no screen for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

Scores = dict[str, float]


def worst(per_class: Mapping[str, Scores], count: int) -> list[tuple[str, Scores]]:
    """The `count` classes of the lowest IoU, that first; those without one come last."""

    def iou(item: tuple[str, Scores]) -> float:
        value = item[1].get("iou", math.nan)
        return value if math.isfinite(value) else math.inf

    return sorted(per_class.items(), key=iou)[:count]
