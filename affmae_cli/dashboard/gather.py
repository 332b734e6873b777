"""Which curves of a run go together in one chart, under which names and colours. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from affmae_cli.dashboard.decode import LOSS_PREFIX
from affmae_cli.dashboard.plot import Trace
from affmae_cli.dashboard.view import Curves, RunView, trace

_HELD_OUT_INK = 4


@dataclass(frozen=True)
class ChartSpec:
    """A chart of the Curves tab. key: for its id; empty: said while there is nothing to draw; floor: lowest height."""

    key: str
    title: str
    empty: str
    floor: float | None = None


SPECS = (
    ChartSpec("loss", "loss", "waiting for the first step"),
    ChartSpec("held-out", "held-out metrics", "not evaluated yet"),
    ChartSpec("lr", "learning rate", "waiting for the first step", 0.0),
    ChartSpec("gradient", "gradient norm, before clipping", "waiting for the first step"),
    ChartSpec("speed", "images/s", "waiting for the first step", 0.0),
    ChartSpec("wait", "data wait, % of the time", "waiting for the first step", 0.0),
    ChartSpec("rank", "effective rank per encoder stage", "not measured (yet)", 0.0),
    ChartSpec("memory", "memory of this run, GiB", "waiting for the first step", 0.0),
)


def traces(view: RunView, key: str, steps: Curves | None = None) -> tuple[Trace, ...]:
    """The curves of a chart. steps: in place of the view's, for a zoomed window."""
    steps = view.steps if steps is None else steps
    match key:
        case "loss":
            return _losses(view, steps)
        case "held-out":
            names = [n for n in view.held_out if not n.startswith("rank.") and not n.endswith((".pixels", ".dice"))]
            names = [n for n in names if n != "score" or names == ["score"]]
            return tuple(trace(n.replace(".iou", " IoU"), view.held_out[n], i) for i, n in enumerate(names))
        case "rank":
            names = [name for name in view.held_out if name.startswith("rank.")]
            return tuple(trace(n.replace("rank.", "stage "), view.held_out[n], i) for i, n in enumerate(names))
    column, name, factor = {
        "lr": ("lr", "lr", 1.0),
        "gradient": ("grad_norm", "gradient", 1.0),
        "speed": ("images_per_s", "images/s", 1.0),
        "wait": ("data_wait", "wait", 100.0),
        "memory": ("memory_gib", "memory", 1.0),
    }[key]
    return (trace(name, steps[column], 0, factor=factor),) if column in steps else ()


def _losses(view: RunView, steps: Curves) -> tuple[Trace, ...]:
    """The total on top, then its named parts, and the held-out loss, which is on the same scale, as marks."""
    names = [name for name in steps if name.startswith(LOSS_PREFIX)]
    found = [trace(name.removeprefix(LOSS_PREFIX), steps[name], ink) for ink, name in enumerate(names)]
    if "loss" in view.held_out:
        ink = _HELD_OUT_INK if len(names) <= _HELD_OUT_INK else len(names)
        found.append(trace("held-out", view.held_out["loss"], ink, marks=True))
    return tuple(found)
