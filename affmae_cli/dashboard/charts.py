"""Which charts a run has: their titles, curves and axes. Read straight from a `RunModel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from affmae_cli.dashboard.colors import class_color, curve_color
from affmae_cli.dashboard.columns import Columns
from affmae_cli.dashboard.plot import Curve, curve_of
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import curve_name, one_line
from affmae_cli.dashboard.verdicts import worst_classes

MOST_CLASSES = 8
"""Classes that are drawn in one chart; more curves are hard to tell apart."""
_NOT_ALONE = ("loss", "score", "iou", "last", "step1", "step2", "mean_fill")  # these are in a chart with others
_SMALL_METRICS = (".pixels", ".dice", ".iou")


@dataclass(frozen=True)
class ChartSpec:
    """A chart. curves: those of a run now; empty: text while there are none; floor: lowest end of the axis, or None.
    x_name: what the x is; charts with the same one share zoom and cursor."""

    key: str
    title: str
    curves: Callable[[RunModel], Sequence[Curve]]
    empty: str = "no values yet"
    floor: float | None = None
    may_log: bool = False
    may_smooth: bool = False
    x_name: str = "step"


def loss_curves(model: RunModel) -> list[Curve]:
    """Held-out loss on top, then the total, then its parts."""
    names = [name.removeprefix("losses.") for name in model.steps.values if name.startswith("losses.")]
    titles = {"dice": "Dice loss", "focal": "focal loss"}
    parts = [
        curve_of(model.steps, f"losses.{n}", titles.get(n) or curve_name(n), curve_color(n, i))
        for i, n in enumerate(names)
    ]
    held_out = "loss" if "loss" in model.held_out else ""
    found = [curve_of(model.held_out, held_out, "held-out", curve_color("held-out"), marks=True)] if held_out else []
    return [*found, *parts]


def iou_curves(model: RunModel) -> list[Curve]:
    """Mean IoU on top, then the IoU of each class, or of the worst where there are many."""
    shown = list(model.classes)
    if len(shown) > MOST_CLASSES:
        shown = [name for name, _ in worst_classes(model)[:MOST_CLASSES]]
    mean = curve_of(model.held_out, "iou", "mean IoU", "foreground", marks=True)
    numbers = model.classes
    classes = [curve_of(model.held_out, f"{n}.iou", one_line(n), class_color(numbers[n]), marks=True) for n in shown]
    return [mean, *classes]


def rank_curves(model: RunModel) -> list[Curve]:
    """Effective rank of every encoder stage."""
    names = [name for name in model.held_out.values if name.startswith("rank.")]
    return [
        curve_of(model.held_out, n, n.replace("rank.", "stage "), curve_color("", i), marks=True)
        for i, n in enumerate(names)
    ]


def _steps(column: str, name: str = "", factor: float = 1.0) -> Callable[[RunModel], list[Curve]]:
    def curves(model: RunModel) -> list[Curve]:
        return (
            [curve_of(model.steps, column, name, curve_color(column), factor=factor)] if column in model.steps else []
        )

    return curves


LOSS = ChartSpec("loss", "loss", loss_curves, "waiting for the first step", may_log=True, may_smooth=True)
IOU = ChartSpec("iou", "IoU of held-out images", iou_curves, "not evaluated yet", floor=0.0)
_FIXED = (
    ChartSpec("lr", "learning rate", _steps("lr"), floor=0.0, may_log=True),
    ChartSpec("grad_norm", "gradient norm before clipping", _steps("grad_norm"), may_log=True, may_smooth=True),
    ChartSpec("images_per_s", "images per second", _steps("images_per_s"), floor=0.0, may_smooth=True),
    ChartSpec("data_wait", "waiting for data, % of the time", _steps("data_wait", factor=100), floor=0.0),
    ChartSpec("memory_gib", "memory of this run, GiB", _steps("memory_gib"), floor=0.0),
    ChartSpec("rank", "effective rank by encoder stage", rank_curves, "not measured", floor=0.0),
)


def main_chart(model: RunModel) -> ChartSpec:
    """The chart that decides: IoU of a finetuning, loss of anything else."""
    return IOU if model.task == "finetune" and "iou" in model.held_out else LOSS


def run_charts(model: RunModel) -> list[ChartSpec]:
    """Every chart over the steps: what decides first, then each metric that has no place in another chart."""
    single = [
        name
        for name in model.held_out.values
        if name not in _NOT_ALONE and not name.startswith("rank.") and not name.endswith(_SMALL_METRICS)
    ]
    metrics = [ChartSpec(f"held_out.{name}", f"held-out: {curve_name(name)}", _metric(name)) for name in single]
    first = [IOU] if "iou" in model.held_out else []
    return [*first, LOSS, *metrics, *(spec for spec in _FIXED if spec.key != "rank" or spec.curves(model))]


def _metric(name: str) -> Callable[[RunModel], list[Curve]]:
    return lambda model: [curve_of(model.held_out, name, "", curve_color("held-out"), marks=True)]


@dataclass(frozen=True)
class MachineFigure:
    """A figure of the machine over time. column: of `RunModel.systems`, times `factor`; each GPU has one of its own."""

    key: str
    title: str
    unit: str
    column: str
    factor: float = 1.0
    of_gpu: bool = True


MACHINE = (
    MachineFigure("load", "GPU load", "%", "gpu_utilisation", 100),
    MachineFigure("memory", "GPU memory", "GiB", "gpu_memory_used"),
    MachineFigure("power", "GPU power", "W", "power"),
    MachineFigure("temperature", "GPU temperature", "°C", "temperature"),
    MachineFigure("clock", "GPU clock", "MHz", "sm_clock"),
    MachineFigure("cpu", "CPU load", "%", "cpu", 100, of_gpu=False),
    MachineFigure("host_memory", "memory of the machine", "GiB", "host_memory_used", of_gpu=False),
    MachineFigure("disk", "disk free", "GiB", "disk_free", of_gpu=False),
)


def gpu_count(model: RunModel) -> int:
    """GPUs with figures."""
    others = {name.partition(".")[0] for name in model.systems.values if name.startswith("gpu") and "." in name}
    return len(others) + any(known(model.systems, figure.column) for figure in MACHINE if figure.of_gpu)


def machine_charts(model: RunModel) -> list[ChartSpec]:
    """Charts over minutes: a curve for each GPU; then the machine itself."""
    specs = []
    for figure in MACHINE:
        if machine_curves(model, figure):
            title = f"{figure.title}, {figure.unit}"
            specs.append(
                ChartSpec(figure.key, title, partial(machine_curves, figure=figure), floor=0.0, x_name="minute")
            )
    if "data_wait" in model.steps:
        specs.append(next(spec for spec in _FIXED if spec.key == "data_wait"))
    return specs


def machine_curves(model: RunModel, figure: MachineFigure) -> list[Curve]:
    """The curves of a figure of the machine over minutes since the first sample; [] where it was never measured."""
    columns = [figure.column, *(f"gpu{n}.{figure.column}" for n in range(1, 64))] if figure.of_gpu else [figure.column]
    found = [column for column in columns if known(model.systems, column)]
    curves = []
    for number, column in enumerate(found):
        name, color = (f"GPU {number}", curve_color("", number)) if len(found) > 1 else ("", curve_color(figure.key))
        curve = curve_of(model.systems, column, name, color, factor=figure.factor)
        curves.append(Curve(name, color, (curve.x_N - model.systems.x_N[0]) / 60, curve.y_3N))
    return curves


def known(columns: Columns, name: str) -> bool:
    """Whether a column has any value."""
    return name in columns and bool(np.isfinite(columns.get(name)[1][0]).any())


_SPARKS = " ▁▂▃▄▅▆▇"


def sparkline(columns: Columns, name: str, width: int, top: float = math.nan) -> str:
    """The history of a column in `width` characters, from 0 (or the lowest value) to `top` (or the highest)."""
    value_N = columns.get(name)[1][0]
    value_N = value_N[np.isfinite(value_N)]
    if not len(value_N) or width < 1:
        return ""
    value_N = np.array([part.mean() for part in np.array_split(value_N, min(width, len(value_N)))])
    fixed = math.isfinite(top) and top > 0
    low, high = (0.0, top) if fixed else (float(value_N.min()), float(value_N.max()))
    place = np.full(len(value_N), 4) if high <= low else np.rint(1 + (value_N - low) / (high - low) * 6)
    return "".join(_SPARKS[int(min(max(p, 1), 7))] for p in place)
