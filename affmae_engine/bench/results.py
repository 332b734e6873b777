"""What a comparison found, as figures: one result per case over its rounds, and ratios between the families.

A figure over rounds is the median of the rounds' medians; its spread is the smallest and the largest of them. Ratios
are AFFMAE against the fastest way of running ViT-MAE in the same task, size, resolution and batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from pydantic import Field

from affmae_engine.bench.case import Case, Measurement, Record, Status
from affmae_engine.bench.comparison import Outcome
from affmae_engine.bench.flops import forward_flops


class Result(Record):
    """A case over its rounds. Times in milliseconds, memory in GiB (on a card only), None where there is no figure."""

    case: Case
    status: Status = "waiting"
    note: str = ""
    """Why there is no figure."""
    how: str = ""
    """How the network was run, in words."""
    parameters: int = 0
    ms: float | None = None
    """Whole step (for `predict`: forward pass)."""
    least_ms: float | None = None
    """Of the fastest round."""
    most_ms: float | None = None
    """Of the slowest round."""
    forward_ms: float | None = None
    """Forward pass with the loss."""
    images_per_s: float | None = None
    mpx_per_s: float | None = None
    """Million pixels per second."""
    forward_images_per_s: float | None = None
    allocated_gib: float | None = None
    """Most memory that tensors took."""
    reserved_gib: float | None = None
    """Most memory that PyTorch held."""
    forward_gflop: float | None = None
    """Operations of the forward pass of one image, in 1e9, a multiplication and an addition being two."""
    forward_gflop_parts: dict[str, float] = Field(default_factory=dict)
    """The same by part of the network."""
    first_step_s: float | None = None
    """Seconds to the end of the first step, with code that was compiled before."""
    compile_s: float | None = None
    """Seconds to the end of the first step in the compiling phase; short where caches held the code already."""
    max_batch: int | None = None
    """The largest batch that fits, to one part in 16; None when it was not looked for."""
    data_images_per_s: float | None = None
    """Images per second with a dataset and the trainer's loader."""
    data_wait: float | None = None
    """Share of that time in which the device waited for data."""
    rounds: list[Measurement] = Field(default_factory=list)
    """What each process found."""


class Ratio(Record):
    """AFFMAE against ViT-MAE in one setting; above 1 AFFMAE is ahead in all but `memory`. None without both figures."""

    work: str
    size: str
    resolution: int
    batch: int
    against: str
    """How ViT-MAE was run."""
    speed: float | None = None
    """ViT-MAE's step time by AFFMAE's."""
    speed_least: float | None = None
    """ViT-MAE's fastest round by AFFMAE's slowest."""
    speed_most: float | None = None
    """ViT-MAE's slowest round by AFFMAE's fastest."""
    forward_speed: float | None = None
    """The same of the forward pass."""
    memory: float | None = None
    """AFFMAE's peak memory by ViT-MAE's."""
    flops: float | None = None
    """ViT-MAE's operations by AFFMAE's."""
    max_batch: float | None = None
    """AFFMAE's largest batch by ViT-MAE's."""


def result_of(outcome: Outcome) -> Result:
    """A case's figures so far."""
    case, rounds = outcome.case, outcome.rounds
    flops = forward_flops(case)
    result = Result(
        case=case,
        rounds=rounds,
        max_batch=outcome.max_batch,
        compile_s=outcome.compiled.first_step_s if outcome.compiled is not None else None,
        forward_gflop=sum(flops.values()) / 1e9,
        forward_gflop_parts={name: value / 1e9 for name, value in flops.items()},
    )
    good = [measured for measured in rounds if measured.status == "ok"]
    if outcome.last is not None and outcome.last.status != "ok":
        return result.model_copy(update={"status": outcome.last.status, "note": outcome.last.note})
    if not good:
        return result
    ms = _median(measured.ms for measured in good)
    forward_ms = _median(measured.forward_ms for measured in good)
    images_per_s = 1e3 * case.batch / ms if ms else None
    return result.model_copy(
        update={
            "status": "ok",
            "note": next((measured.note for measured in good if measured.note), ""),
            "how": good[-1].how,
            "parameters": good[-1].parameters,
            "ms": ms,
            "least_ms": min(measured.ms for measured in good if measured.ms is not None),
            "most_ms": max(measured.ms for measured in good if measured.ms is not None),
            "forward_ms": forward_ms,
            "images_per_s": images_per_s,
            "mpx_per_s": images_per_s * case.resolution**2 / 1e6 if images_per_s else None,
            "forward_images_per_s": 1e3 * case.batch / forward_ms if forward_ms else None,
            "allocated_gib": _median(measured.allocated_gib for measured in good),
            "reserved_gib": _median(measured.reserved_gib for measured in good),
            "first_step_s": _median(measured.first_step_s for measured in good),
            "data_images_per_s": _median(measured.data_images_per_s for measured in good),
            "data_wait": _median(measured.data_wait for measured in good),
        }
    )


def ratios_of(results: Sequence[Result]) -> list[Ratio]:
    """One ratio per setting in which both families were asked for, in the order of the results."""
    found = []
    for ours in results:
        if ours.case.model != "affmae":
            continue
        theirs = [r for r in results if r.case.model != "affmae" and _setting(r.case) == _setting(ours.case)]
        if theirs:
            found.append(_ratio(ours, min(theirs, key=lambda result: result.ms or math.inf)))
    return found


def _ratio(ours: Result, theirs: Result) -> Ratio:
    work, size, resolution, batch = _setting(ours.case)
    return Ratio(
        work=work,
        size=size,
        resolution=resolution,
        batch=batch,
        against=theirs.how,
        speed=_quotient(theirs.ms, ours.ms),
        speed_least=_quotient(theirs.least_ms, ours.most_ms),
        speed_most=_quotient(theirs.most_ms, ours.least_ms),
        forward_speed=_quotient(theirs.forward_ms, ours.forward_ms),
        memory=_quotient(ours.allocated_gib, theirs.allocated_gib),
        flops=_quotient(theirs.forward_gflop, ours.forward_gflop),
        max_batch=_quotient(ours.max_batch, theirs.max_batch),
    )


def _setting(case: Case) -> tuple[str, str, int, int]:
    return case.work, case.size, case.resolution, case.batch


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _quotient(upper: float | None, lower: float | None) -> float | None:
    return upper / lower if upper and lower else None
