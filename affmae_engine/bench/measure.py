"""Measures one case in this process: step and forward times, memory, time to the first step, and loading.

A failure is in the result, not raised: running out of memory on one side is something that a comparison has to say.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from affmae_engine.bench.case import Measurement, Request
from affmae_engine.bench.loading import with_loading
from affmae_engine.bench.profile import profile_step
from affmae_engine.bench.step import Call, Network, make_forward, make_network, make_step, random_batches
from affmae_engine.bench.timing import Timing, step_times
from affmae_engine.config import TrainConfig
from affmae_engine.errors import first_line
from affmae_engine.train.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.train.memory import free_memory, out_of_memory
from affmae_engine.train.step import EAGER_STEPS


@dataclass(frozen=True)
class _Steps:
    """Timed steps of a network run in one way. Memory in GiB, on a card only."""

    network: Network
    timing: Timing
    loss: float
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    profile: dict[str, Any] | None = None


def answer(request: Request) -> Measurement:
    """Does what is asked.

    Raises:
        AffmaeError: the device cannot be used at all.
    """
    exact_fp32()
    choice = pick_device(TrainConfig(device=request.device, precision=request.precision))
    result = Measurement()
    problem = _problem(partial(_measure, result, request, choice))
    if problem is not None:
        result.status, result.note = ("out of memory" if problem[0] else "failed"), problem[1]
        result.ms = result.low_ms = result.high_ms = result.forward_ms = None
    return result


def _measure(result: Measurement, request: Request, choice: DeviceChoice) -> None:
    case, begin = request.case, time.perf_counter()
    batches = random_batches(case, choice.device)
    network = make_network(case, choice, recorded=case.vit_mode == "graph")
    result.how, result.parameters = network.how, network.parameters
    step = make_step(case, network, choice, itertools.cycle(batches))
    float(step())
    result.first_step_s = time.perf_counter() - begin
    _warm_up(step, request, network, choice.device)
    result.ready_s = time.perf_counter() - begin
    if request.what == "try":
        return
    ways = [_timed(step, request, network, choice.device)]
    del step
    free_memory(choice.device)  # the optimizer's moments do not count for what comes next
    notes = []
    if case.model == "vit-mae" and case.vit_mode == "auto" and network.recordable:
        notes.append(_note("recorded step", partial(_record_too, ways, request, choice, batches)))
        result.modes_ms = {way.network.how: way.timing.ms for way in ways}
    best = min(ways, key=lambda way: way.timing.ms)
    _take_over(result, best)
    if case.work != "predict":
        attempt = partial(_time_forward, result, request, choice, best.network, batches)
        notes.append(_note("forward pass alone", attempt))
    if request.data is not None and case.work == "pretrain":
        notes.append(_note("with the dataset", partial(with_loading, result, request, choice, best.network)))
    result.note = "; ".join(filter(None, notes))


def _record_too(ways: list[_Steps], request: Request, choice: DeviceChoice, batches: list[dict[str, Tensor]]) -> None:
    """Times the same network with recorded steps, as a further way of running it."""
    network = ways[0].network.as_recorded()
    step = make_step(request.case, network, choice, itertools.cycle(batches))
    _warm_up(step, request, network, choice.device)
    ways.append(_timed(step, request, network, choice.device))


def _warm_up(step: Call, request: Request, network: Network, device: torch.device) -> None:
    if device.type == "cuda":
        free_memory(device)  # what compilation left behind
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(max(request.warmup, EAGER_STEPS + 2) if network.recorded else request.warmup):
        step()
    _synchronize(device)


def _timed(step: Call, request: Request, network: Network, device: torch.device) -> _Steps:
    """Times of the steps, and the memory that they take: what a recording allocates is counted when it is made."""
    on_card = device.type == "cuda"
    recording = 0
    if on_card:
        recording = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()  # what recording left behind
        torch.cuda.reset_peak_memory_stats(device)
    timing = step_times(step, device, request.steps)
    allocated = max(recording, torch.cuda.max_memory_allocated(device)) / 2**30 if on_card else None
    reserved = torch.cuda.max_memory_reserved(device) / 2**30 if on_card else None
    loss = float(step())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    profile = profile_step(step, device).as_dict() if request.profile else None
    return _Steps(network, timing, loss, allocated, reserved, profile)


def _take_over(result: Measurement, steps: _Steps) -> None:
    timing = steps.timing
    result.ms, result.low_ms, result.high_ms, result.repeats = timing.ms, timing.low_ms, timing.high_ms, timing.repeats
    result.how, result.loss, result.profile = steps.network.how, steps.loss, steps.profile
    result.allocated_gib, result.reserved_gib = steps.allocated_gib, steps.reserved_gib
    result.forward_ms = timing.ms  # of predicting; in training it is timed by itself


def _time_forward(
    result: Measurement, request: Request, choice: DeviceChoice, network: Network, batches: list[dict[str, Tensor]]
) -> None:
    result.forward_ms = None
    forward = make_forward(network, choice, batches[0])
    for _ in range(2):
        forward()
    result.forward_ms = step_times(forward, choice.device, request.steps).ms


def _note(what: str, attempt: Callable[[], None]) -> str:
    """Why a further figure is missing; empty when all went well. What is known already stays."""
    problem = _problem(attempt)
    return f"{what}: {problem[1]}" if problem else ""


def _problem(attempt: Callable[[], None]) -> tuple[bool, str] | None:
    """Whether memory ran out, and what was said; None when all went well."""
    try:
        attempt()
    except Exception as error:  # one side's failure must not hide the other's result
        out = out_of_memory(error)
        return out is not None, first_line(out or error)
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
