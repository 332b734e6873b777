"""Which curves of a run go together in one chart, under which names and colours. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from affmae_cli.dashboard.decode import LOSS_PREFIX
from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.plot import Trace
from affmae_cli.dashboard.series import Curve
from affmae_cli.dashboard.view import Compared, Curves, RunView, trace

MOST_CLASSES = 8
"""Classes that are drawn in one chart; more curves cannot be told apart."""
_HELD_OUT_INK = 4
_LEFT_OUT = ("score", "iou_per_image", "accuracy")  # metrics that repeat or blur the others in a chart


@dataclass(frozen=True)
class ChartSpec:
    """A chart of the Curves tab. key: for its id; empty: said while there is nothing to draw; floor: lowest height.
    may_log, may_smooth: whether a logarithmic axis and moving means make sense."""

    key: str
    title: str
    empty: str
    floor: float | None = None
    may_log: bool = False
    may_smooth: bool = True


SPECS = (
    ChartSpec("loss", "loss", "waiting for the first step", may_log=True),
    ChartSpec("held-out", "held-out metrics", "not evaluated yet"),
    ChartSpec("lr", "learning rate", "waiting for the first step", 0.0, may_log=True, may_smooth=False),
    ChartSpec("gradient", "gradient norm, before clipping", "waiting for the first step", may_log=True),
    ChartSpec("speed", "images/s", "waiting for the first step", 0.0),
    ChartSpec("wait", "data wait, % of the time", "waiting for the first step", 0.0),
    ChartSpec("rank", "effective rank per encoder stage", "not measured (yet)", 0.0),
)


def traces(view: RunView, key: str) -> tuple[Trace, ...]:
    """The curves of a chart."""
    steps = view.detail or view.steps
    match key:
        case "loss":
            return _losses(view, steps)
        case "held-out":
            names = [n for n in view.held_out if not (n in _LEFT_OUT or "." in n)] + _worst_classes(view)
            return tuple(_named(n.replace(".iou", " IoU"), view.held_out[n], i) for i, n in enumerate(names))
        case "rank":
            names = [name for name in view.held_out if name.startswith("rank.")]
            return tuple(_named(n.replace("rank.", "stage "), view.held_out[n], i) for i, n in enumerate(names))
    column, name, factor = {
        "lr": ("lr", "lr", 1.0),
        "gradient": ("grad_norm", "gradient", 1.0),
        "speed": ("images_per_s", "images/s", 1.0),
        "wait": ("data_wait", "wait", 100.0),
    }[key]
    return (trace(name, steps[column], 0, factor=factor),) if column in steps else ()


def title(view: RunView, spec: ChartSpec) -> str:
    """A chart's title; it says when not every class is drawn."""
    count = len(_classes(view))
    left_out = spec.key == "held-out" and count > MOST_CLASSES
    return f"{spec.title}, the worst {MOST_CLASSES} of {count} classes" if left_out else spec.title


def _classes(view: RunView) -> list[str]:
    return [name for name in view.held_out if name.endswith(".iou")]


def _worst_classes(view: RunView) -> list[str]:
    """The curves of all classes, or of those that have the lowest IoU now where there are many."""
    names = _classes(view)
    if len(names) <= MOST_CLASSES:
        return names
    return sorted(names, key=lambda name: _newest(view.held_out[name]))[:MOST_CLASSES]


def _newest(curve: Curve) -> float:
    """The last value; infinite without one, as when a resumed run does its evaluations again."""
    value = float(curve.mean_N[-1]) if len(curve) else math.nan
    return math.inf if math.isnan(value) else value


def _named(name: str, curve: Curve, ink: int, *, marks: bool = False) -> Trace:
    return trace(one_line(name), curve, ink, marks=marks)


def _losses(view: RunView, steps: Curves) -> tuple[Trace, ...]:
    """The total on top, then its named parts, and the held-out loss, which is on the same scale, as marks."""
    names = [name for name in steps if name.startswith(LOSS_PREFIX)]
    found = [_named(name.removeprefix(LOSS_PREFIX), steps[name], ink) for ink, name in enumerate(names)]
    if "loss" in view.held_out:
        ink = _HELD_OUT_INK if len(names) <= _HELD_OUT_INK else len(names)
        found.append(trace("held-out", view.held_out["loss"], ink, marks=True))
    return tuple(found)


SYSTEM_SPECS = (
    ChartSpec("memory", "VRAM over minutes, GiB", "no sample of a card yet", 0.0),
    ChartSpec("busy", "busy over minutes, %", "no sample of the machine yet", 0.0),
    ChartSpec("power", "power over minutes, W", "no sample of a card yet", 0.0),
    ChartSpec("heat", "temperature over minutes, °C", "no sample of a card yet", 0.0),
)
"""Charts of the System tab, over minutes since the first sample."""
_SYSTEM_COLUMNS = {
    "memory": (("gpu_memory_used", "used", 1.0), ("gpu_memory_others", "others", 1.0)),
    "busy": (("gpu_utilisation", "GPU", 100.0), ("cpu", "CPU", 100.0)),
    "power": (("power", "power", 1.0),),
    "heat": (("temperature", "heat", 1.0),),
}


def system_traces(view: RunView, key: str) -> tuple[Trace, ...]:
    """The curves of a chart of the System tab; what was never measured is left out."""
    found = []
    for ink, (column, name, factor) in enumerate(_SYSTEM_COLUMNS[key]):
        curve = view.systems.get(column)
        if curve is not None and np.isfinite(curve.mean_N).any():
            drawn = trace(name, curve, ink, factor=factor)
            found.append(replace(drawn, x=(drawn.x - drawn.x[0]) / 60))
    return tuple(found)


@dataclass(frozen=True)
class Comparison:
    """A curve in which runs are compared: columns of the steps or of the evaluations, the first that a run has."""

    title: str
    held_out: bool
    columns: tuple[str, ...]


COMPARISONS = (
    Comparison("loss", False, (f"{LOSS_PREFIX}loss",)),
    Comparison("held-out loss or IoU", True, ("iou", "loss")),
    Comparison("learning rate", False, ("lr",)),
    Comparison("images/s", False, ("images_per_s",)),
)


def comparison_traces(runs: Sequence[Compared], comparison: Comparison) -> tuple[Trace, ...]:
    """One curve a run, named as the run is."""
    found = []
    for ink, run in enumerate(runs):
        curves = run.held_out if comparison.held_out else run.steps
        column = next((name for name in comparison.columns if name in curves), None)
        if column is not None:
            found.append(_named(run.root.name, curves[column], ink))
    return tuple(found)
