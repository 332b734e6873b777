"""Measurements as a CSV file and as a summary per class.

Axes: N objects, 3 is z y x.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from affmae_engine import atomic
from affmae_engine.objects.measure import ObjectTable

_DIGITS = 7


@dataclass(frozen=True)
class ClassSummary:
    """The objects of one class: how many, how large in sum and on average, and how many the border cuts.

    sizes, diameters: mean, median and standard deviation of those that touch no border (of all, where all touch).
    enclosed: objects that have an enclosing object; hosts: how many different ones.
    """

    class_name: str
    objects: int
    touching_border: int
    total_size: float
    size: tuple[float, float, float]
    diameter: tuple[float, float, float]
    roundness: float
    enclosed: int
    hosts: int


def columns(table: ObjectTable) -> dict[str, Callable[[int], object]]:
    """Header and value of every column of the CSV, in order; headers carry the unit."""
    unit = table.unit
    power = "2" if table.flat else "3"
    size, border, roundness = (
        ("area", "perimeter", "circularity") if table.flat else ("volume", "surface", "sphericity")
    )
    border_unit = unit if table.flat else f"{unit}2"
    axes = (1, 2) if table.flat else (0, 1, 2)
    result: dict[str, Callable[[int], object]] = {
        "id": lambda i: int(table.ids_N[i]),
        "class": lambda i: table.class_name(int(table.class_N[i])),
        "voxels" if not table.flat else "pixels": lambda i: int(table.voxels_N[i]),
        f"{size}_{unit}{power}": lambda i: _number(table.size_N[i]),
        f"{border}_{border_unit}": lambda i: _number(table.border_N[i]),
        f"equivalent_diameter_{unit}": lambda i: _number(table.diameter_N[i]),
        roundness: lambda i: _number(table.roundness_N[i]),
        f"major_axis_{unit}": _column(table.axes_N3, 0),
    }
    if not table.flat:
        result[f"middle_axis_{unit}"] = _column(table.axes_N3, 1)
    result[f"minor_axis_{unit}"] = _column(table.axes_N3, 2)
    for name, values in (("centroid", table.centroid_N3), ("bbox_low", table.low_N3), ("bbox_high", table.high_N3)):
        for axis in axes:
            result[f"{name}_{'zyx'[axis]}_{unit}"] = _column(values, axis)
    for axis in axes:
        result[f"centroid_{'zyx'[axis]}_index"] = _column(table.centroid_voxel_N3, axis)
    result |= {
        "mean_gray": lambda i: _number(float(table.grey_N[i])),
        "touches_border": lambda i: int(table.touches_border_N[i]),
        "nearest_id": lambda i: int(table.neighbor_N[i]) or "",
        f"nearest_distance_{unit}": lambda i: _number(float(table.neighbor_distance_N[i])),
        "enclosing_id": lambda i: int(table.host_N[i]) or "",
    }
    return result


def write_csv(path: Path, table: ObjectTable) -> None:
    """One row per object, with a header; written atomically.

    Raises:
        ResourceError: it cannot be written.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            _write_rows(file, table)

    atomic.commit_file(path, write)


def csv_text(table: ObjectTable) -> str:
    """The same as a string."""
    text = io.StringIO(newline="")
    _write_rows(text, table)
    return text.getvalue()


def summarize(table: ObjectTable) -> list[ClassSummary]:
    """One summary per class, in the order of class indices."""
    return list(_summaries(table))


def _summaries(table: ObjectTable) -> Iterator[ClassSummary]:
    for one in np.unique(table.class_N).tolist():
        own = table.class_N == one
        whole = own & ~table.touches_border_N
        counted = whole if whole.any() else own
        yield ClassSummary(
            class_name=table.class_name(one) or "objects",
            objects=int(own.sum()),
            touching_border=int((own & table.touches_border_N).sum()),
            total_size=float(table.size_N[own].sum()),
            size=_spread(table.size_N[counted]),
            diameter=_spread(table.diameter_N[counted]),
            roundness=float(table.roundness_N[counted].mean()),
            enclosed=int((table.host_N[own] != 0).sum()),
            hosts=len(np.unique(table.host_N[own & (table.host_N != 0)])),
        )


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.mean()), float(np.median(values)), float(values.std())


def _write_rows(file: TextIO, table: ObjectTable) -> None:
    described = columns(table)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(described)
    for i in range(len(table.ids_N)):
        writer.writerow([value(i) for value in described.values()])


def _column(values_N3: np.ndarray, axis: int) -> Callable[[int], object]:
    return lambda i: _number(float(values_N3[i, axis]))


def _number(value: float) -> str:
    """Seven significant digits; empty for a value that does not exist."""
    return "" if math.isnan(value) else f"{value:.{_DIGITS}g}"
