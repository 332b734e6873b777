"""Clocks: training steps in rounds, single calls with cold caches, what the device can do at most, top kernels.

On a GPU the clock is CUDA events; on a CPU it is `perf_counter`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from affmae_engine.runtime.cuda_graphs import capture

Call = Callable[[], object]

ROUNDS = 3
ROUND_S = 0.4
"""Seconds of one round of steps, ..."""
FEWEST_STEPS, MOST_STEPS = 2, 10
"""... within these numbers of steps."""

FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU."""
CALLS_PER_GRAPH = 16
FEWEST_REPEATS, MOST_REPEATS = 5, 100

KERNELS_SHOWN = 30


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the 20th and 80th percentile (of steps: fastest and slowest round)."""

    ms: float
    low_ms: float
    high_ms: float
    repeats: int


def time_rounds(step: Call, device: torch.device, during: Callable[[], None] = lambda: None) -> Timing:
    """Time a training step in `ROUNDS` rounds without waiting between the steps of a round.

    Args:
        step: takes one step.
        device: where.
        during: called once per round after its steps are queued, while a GPU still works on them.
    """
    # Choose the number of steps from one step.
    step_s = _seconds(step, 1, device)
    count = min(max(int(ROUND_S / max(step_s, 1e-6)), FEWEST_STEPS), MOST_STEPS)
    rounds = [1e3 * _seconds(step, count, device, during) / count for _ in range(ROUNDS)]
    return Timing(statistics.median(rounds), min(rounds), max(rounds), ROUNDS * count)


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, graph: bool = False, warmup: int = 2
) -> Timing:
    """Time one call with caches as cold as in a training step.

    Args:
        calls: the same computation on different inputs; they take turns.
        device: where they compute.
        seconds: about how long to measure.
        graph: capture the calls in a CUDA graph, so that the time of launching them does not count; they must not
            synchronize with the host.
        warmup: untimed calls of each.
    """
    for call in calls:
        for _ in range(warmup):
            call()
    if device.type != "cuda":
        return _summary(_cpu_times(calls, seconds))
    torch.cuda.synchronize(device)
    if not graph:
        return _summary(_cuda_times(calls, seconds, device))
    per_graph = len(calls) * max(1, CALLS_PER_GRAPH // len(calls))
    with capture() as recorded:
        for number in range(per_graph):
            calls[number % len(calls)]()
    return _summary([ms / per_graph for ms in _cuda_times([recorded.replay], seconds, device)])


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device: bytes read plus written per second by a copy (1e9), operations per second of a
    matrix product (1e12)."""

    gb_s: float
    tflop_s: float

    def bound_ms(self, size: float, flops: float) -> float:
        """The least time for moving `size` bytes and computing `flops` operations."""
        return max(size / self.gb_s / 1e6, flops / self.tflop_s / 1e9)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy a buffer larger than any cache, and multiply large square matrices of `dtype`."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**29 if on_gpu else 2**24, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    edge = 8192 if on_gpu else 256
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = time_calls([lambda: left @ right], device, seconds=0.5 if on_gpu else 0.05)
    return Ceilings(2 * source.numel() / copy.ms / 1e6, 2 * edge**3 / product.ms / 1e9)


def top_kernels(step: Call, device: torch.device, *, steps: int = 3) -> list[tuple[str, float, float]]:
    """The most expensive kernels of a step (on a CPU: operators) as (name, milliseconds, launches) per step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        _synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    found = []
    for event in profiler.key_averages():
        if event.device_type == wanted and not event.is_user_annotation:
            microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            found.append((event.key[:160], microseconds / 1e3 / steps, event.count / steps))
    return sorted(found, key=lambda kernel: -kernel[1])[:KERNELS_SHOWN]


def _seconds(step: Call, count: int, device: torch.device, during: Callable[[], None] = lambda: None) -> float:
    """Seconds of `count` steps."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - start
    first = _event()
    for _ in range(count):
        step()
    last = _event()
    during()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def _cpu_times(calls: Sequence[Call], seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < FEWEST_REPEATS or (sum(times) < 1e3 * seconds and len(times) < MOST_REPEATS):
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times(calls: Sequence[Call], seconds: float, device: torch.device) -> list[float]:
    """Each call between two events. The copy before it overwrites the L2 cache and lets the host run ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def timed(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        flush.zero_()
        start = _event()
        call()
        return start, _event()

    first = timed(calls[0])
    torch.cuda.synchronize(device)
    guess_ms = max(first[0].elapsed_time(first[1]), 1e-3)
    repeats = min(max(int(1e3 * seconds / guess_ms), FEWEST_REPEATS), MOST_REPEATS)
    pairs = [timed(calls[number % len(calls)]) for number in range(repeats)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) for start, stop in pairs]


def _summary(times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
