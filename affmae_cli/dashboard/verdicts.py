"""What the figures of a run mean, in words, with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from affmae_cli.dashboard.text import curve_name, duration, number, one_line
from affmae_engine.config import RunConfig
from affmae_engine.events import SystemSampled
from affmae_engine.model.sizes import size_of

if TYPE_CHECKING:
    from affmae_cli.dashboard.columns import Columns, Floats
    from affmae_cli.dashboard.run_model import RunModel

DATA_BOUND, DATA_PARTLY = 0.2, 0.05
"""Shares of the wall time spent waiting for data, above which the run is data-bound, or partly so."""
IDLE = 0.5
"""Utilization of the GPU below which it is called half idle."""
OTHERS_SHARE = 0.1
"""Share of the GPU's memory held by other processes that is worth saying."""
COLLAPSE_OF_BEST, COLLAPSE_OF_POSSIBLE = 0.25, 0.02
"""A stage's features collapse below this share of their highest effective rank so far, or of the possible one."""
FAST, SLOW = 0.10, 0.01
"""Share of the whole change so far that the last quarter made: above FAST a curve moves, below SLOW it is flat."""
FEWEST_POINTS = 4

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Verdict:
    """One sentence. level: good, note (worth knowing) or bad (something to do about)."""

    level: Level
    text: str


def verdicts_of(model: RunModel) -> list[Verdict]:
    """Everything that can be said of a run, the speed first."""
    found = [speed_verdict(model.data_wait, model.system, on_cpu=model.on_cpu), *system_verdicts(model.system)]
    if diverged(model.steps):
        found.append(Verdict("bad", "the loss is higher than at the start: lower optim.lr"))
    ranks = model.evaluated.effective_rank if model.evaluated else []
    possible = possible_ranks(model.config) if model.config is not None else [0.0] * len(ranks)
    collapse = collapse_verdict(ranks, model.highest_ranks, possible)
    return [*found, collapse] if collapse is not None else found


def headline(model: RunModel) -> Verdict:
    """The run in one sentence: what it has learned, whether it still learns, what limits it, how long it takes."""
    if model.latest is None:
        return Verdict("note", one_line(model.status.text))
    parts = [part for part in (_learned(model), "" if model.status.ended else _supply(model), _left(model)) if part]
    bad = diverged(model.steps) or model.status.kind in ("failed", "gone", "stalled")
    return Verdict("bad" if bad else "good", "; ".join(parts))


def _learned(model: RunModel) -> str:
    found = model.evaluated
    going = _going(model)
    if found is None:
        return f"loss {number(model.latest.losses.get('loss', math.nan) if model.latest else math.nan)}{going}"
    explained = found.metrics.get("explained", math.nan)
    if math.isfinite(explained):
        if explained <= 0:
            return f"no better than filling what is hidden with its mean so far{going}"
        return f"explains {explained:.0%} of what is hidden{going}"
    if "iou" in found.metrics:
        weakest = weakest_class(model)
        return f"mean IoU {found.metrics['iou']:.3f}{going}" + (f"; weakest: {weakest}" if weakest else "")
    name = next((name for name in ("loss", "score") if name in found.metrics), "")
    return f"held-out {curve_name(name)} {number(found.metrics[name])}{going}" if name else ""


def _going(model: RunModel) -> str:
    """How the decisive curve moves, with a comma before it; "" when it is not known or the run ended."""
    higher = "iou" in model.held_out
    x_N, value_3N = model.held_out.get("iou" if higher else "loss")
    if len(x_N) < FEWEST_POINTS and not higher:
        x_N, value_3N = model.steps.get("losses.loss")
    moving = trend(x_N, value_3N[0])
    if not moving:
        return ""
    wanted = "rising" if higher else "falling"
    if moving == "flat":
        said = moving
    else:
        said = f"still {moving}" if moving.startswith(wanted) else f"{'IoU' if higher else 'loss'} {moving}"
    return f", {said} at the end" if model.status.ended else f", {said}"


def trend(x_N: Floats, value_N: Floats) -> str:
    """falling, rising (slowly) or flat, by the last quarter of a curve; "" for fewer than FEWEST_POINTS points."""
    known = np.isfinite(value_N)
    x_N, value_N = x_N[known], value_N[known]
    if len(x_N) < FEWEST_POINTS:
        return ""
    place = (x_N - x_N[0]) / max(x_N[-1] - x_N[0], 1e-12)
    quarters = [value_N[(place >= q / 4) & (place <= (q + 1) / 4)] for q in (2, 3)]
    if not all(len(quarter) for quarter in quarters):
        return ""
    change = float(quarters[1].mean() - quarters[0].mean())
    spread = float(value_N.max() - value_N.min())
    if spread == 0 or abs(change) < SLOW * spread:
        return "flat"
    return f"{'falling' if change < 0 else 'rising'}{'' if abs(change) >= FAST * spread else ' slowly'}"


def weakest_class(model: RunModel) -> str:
    """The class of the lowest IoU and that IoU; "" for one class or none."""
    scores = worst_classes(model)
    return f"{one_line(scores[0][0])} {scores[0][1]:.3f}" if len(scores) > 1 else ""


def worst_classes(model: RunModel) -> list[tuple[str, float]]:
    """Classes with their IoU, lowest first; those without one last."""
    found = model.evaluated.per_class if model.evaluated else {}
    scores = [(name, values.get("iou", math.nan)) for name, values in found.items()]
    return sorted(scores, key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)


def _supply(model: RunModel) -> str:
    if math.isnan(model.data_wait):
        return ""
    if model.data_wait >= DATA_PARTLY:
        return f"waits for data {model.data_wait:.0%} of the time"
    return "data arrives in time"


def _left(model: RunModel) -> str:
    if model.status.kind == "finished":
        return f"finished in {duration(model.elapsed_s)}"
    if model.status.ended or model.status.kind == "stalled":
        return one_line(model.status.text)
    return f"{duration(model.eta_s)} left" if math.isfinite(model.eta_s) else "time left not known yet"


def diverged(steps: Columns) -> bool:
    """Whether the loss is above where it began after it had been well below."""
    value_N = steps.get("losses.loss")[1][0]
    value_N = value_N[np.isfinite(value_N)]
    if len(value_N) < 20:
        return False
    width = max(3, len(value_N) // 50)
    means_N = np.convolve(value_N, np.ones(width) / width, "valid")
    begun, lowest, newest = means_N[0], means_N.min(), means_N[-1]
    return bool(newest > begun and newest - lowest > 0.5 * abs(begun))


def speed_verdict(data_wait: float, system: SystemSampled | None, *, on_cpu: bool) -> Verdict:
    """What limits the speed of the run.

    Args:
        data_wait: share of the wall time spent waiting for data, 0 to 1; NaN before it is known.
        system: the newest sample of the machine, if there is one.
        on_cpu: the run computes on the CPU.
    """
    hot = _thermal(system)
    if hot is not None:
        return hot
    if math.isnan(data_wait):
        return Verdict("note", "too few steps yet to tell what limits the speed")
    if data_wait >= DATA_BOUND:
        return Verdict("bad", "data-bound: raise data.workers or move the dataset to a local disk")
    if on_cpu:
        return Verdict("note", "no GPU: training runs on the CPU, many times slower than on an NVIDIA GPU")
    if data_wait >= DATA_PARTLY:
        return Verdict("note", "partly data-bound: more data.workers may help")
    if system is not None and system.gpu_utilisation < IDLE:
        return Verdict("note", "the GPU is half idle, and data is not the reason: raise train.micro_batch")
    limit = " (at its power limit)" if system is not None and "power limit" in system.throttled else ""
    return Verdict("good", f"GPU-bound: good{limit}")


def system_verdicts(system: SystemSampled | None) -> list[Verdict]:
    """What is worth knowing of the machine."""
    if system is None:
        return []
    found = []
    if system.gpu_missing:
        prefix = "no figures of the GPU: " if system.gpu else ""
        found.append(Verdict("note", prefix + one_line(system.gpu_missing)))
    if system.gpu_memory_others > OTHERS_SHARE * system.gpu_memory_total:
        found.append(Verdict("note", f"other processes hold {system.gpu_memory_others:.1f} GiB of the GPU"))
    if system.gpu_memory_used > 0.97 * system.gpu_memory_total:
        found.append(Verdict("note", "the GPU's memory is full"))
    if system.host_memory_used > 0.95 * system.host_memory_total:
        found.append(Verdict("bad", "the machine's memory is nearly full: lower data.workers or close other programs"))
    return found


def collapse_verdict(ranks: Sequence[float], highest: Sequence[float], possible: Sequence[float]) -> Verdict | None:
    """Whether the features of a stage collapse; None when no rank is known.

    Args:
        ranks: effective rank of each encoder stage.
        highest: the highest so far, per stage.
        possible: see `possible_ranks`.
    """
    found = None
    for stage, (rank, top, most) in enumerate(zip(ranks, highest, possible, strict=False), 1):
        if rank < COLLAPSE_OF_BEST * top or rank < COLLAPSE_OF_POSSIBLE * most:
            return Verdict("bad", f"stage {stage} collapses (effective rank {rank:.1f}, was {top:.1f}): lower optim.lr")
        if math.isfinite(rank):
            found = Verdict("good", "no stage collapses")
    return found


def possible_ranks(config: RunConfig) -> list[float]:
    """The highest effective rank that each encoder stage can have: its width, or one less than its tokens."""
    model = config.model
    tokens = (config.image_size / model.patch_size) ** 2 * (1 - config.mask.ratio)
    dims = size_of(model).dims
    return [min(width, tokens * model.merge_keep**stage - 1) for stage, width in enumerate(dims)]


def _thermal(system: SystemSampled | None) -> Verdict | None:
    if system is None or not any("thermal" in reason for reason in system.throttled):
        return None
    at = f" at {system.temperature:.0f} °C" if math.isfinite(system.temperature) else ""
    slow = ""
    if math.isfinite(system.sm_clock) and math.isfinite(system.sm_clock_max):
        slow = f" ({system.sm_clock:.0f} of {system.sm_clock_max:.0f} MHz)"
    return Verdict("bad", f"thermal throttling{at}{slow}: improve cooling or lower the GPU's power limit")
