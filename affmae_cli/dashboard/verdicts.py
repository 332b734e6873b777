"""What the figures of a run mean, in words, with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from affmae_engine.config import RunConfig
from affmae_engine.events import SystemSampled
from affmae_engine.model.sizes import size_of

DATA_BOUND, DATA_PARTLY = 0.2, 0.05
"""Shares of the wall time spent waiting for data, above which the run is data-bound, or partly so."""
IDLE = 0.5
"""Utilisation of the card below which it idles."""
OTHERS_SHARE = 0.1
"""Share of the card's memory held by others that is worth saying."""
COLLAPSE_OF_BEST, COLLAPSE_OF_POSSIBLE = 0.25, 0.02
"""A stage's features collapse below this share of the highest effective rank that it had, or of the possible one."""

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Verdict:
    """One sentence. level: good, note (worth knowing) or bad (something to do about)."""

    level: Level
    text: str


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
        return Verdict("bad", "data-bound: raise data.workers or move the store to a local disk")
    if on_cpu:
        return Verdict("note", "no GPU: training runs on the CPU, many times slower than on an NVIDIA card")
    if data_wait >= DATA_PARTLY:
        return Verdict("note", "partly data-bound: more data.workers may help")
    if system is not None and system.gpu_utilisation < IDLE:
        return Verdict("note", "the card is half idle and not for want of data: raise train.micro_batch")
    limit = " (at its power limit)" if system is not None and "power limit" in system.throttled else ""
    return Verdict("good", f"GPU-bound: good{limit}")


def system_verdicts(system: SystemSampled | None) -> list[Verdict]:
    """What is worth knowing of the machine."""
    if system is None:
        return []
    found = []
    if system.gpu_missing:
        prefix = "no figures of the card: " if system.gpu else ""
        found.append(Verdict("note", prefix + system.gpu_missing))
    if system.gpu_memory_others > OTHERS_SHARE * system.gpu_memory_total:
        found.append(Verdict("note", f"other processes hold {system.gpu_memory_others:.1f} GiB of the card"))
    if system.gpu_memory_used > 0.97 * system.gpu_memory_total:
        found.append(Verdict("note", "the card's memory is full"))
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
    return Verdict("bad", f"thermal throttling{at}{slow}: the card slows down; give it air or lower its power limit")
