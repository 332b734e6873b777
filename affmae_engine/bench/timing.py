"""How long something takes: medians, after a warm-up, with caches that are as cold as in a training step.

On a card the clock is CUDA events. Calls of a few microseconds are captured in one CUDA graph that walks over several
sets of inputs, so that neither the host nor a warm L2 cache shows; what cannot be captured is timed call by call with
the L2 cache overwritten in between. On a CPU the clock is `perf_counter`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from affmae_engine.train.cuda_graphs import capture

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any card (RTX 5090: 96 MiB)."""
CALLS_PER_GRAPH = 16
MOST_REPEATS, LEAST_REPEATS = 100, 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile; how often; whether it ran in a CUDA graph."""

    ms: float
    low_ms: float
    high_ms: float
    repeats: int
    graphed: bool = False


def measure(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.25, graph: bool = False, warmup: int = 2
) -> Timing:
    """Times one call.

    Args:
        calls: the same computation on different inputs; they take turns.
        device: where they compute.
        seconds: roughly how long to measure, within `LEAST_REPEATS` and `MOST_REPEATS`.
        graph: try a CUDA graph first. The calls must not wait for the device.
        warmup: calls of each before anything is timed.
    """
    for call in calls:
        for _ in range(warmup):
            call()
    if device.type != "cuda":
        return _summary(_cpu_times(calls, seconds))
    torch.cuda.synchronize(device)
    replay = _captured(calls) if graph else None
    if replay is None:
        return _summary(_cuda_times(calls, seconds, device))
    times = _cuda_times([replay], seconds, device)
    return _summary([time / _per_graph(calls) for time in times], graphed=True)


def step_times(step: Call, device: torch.device, repeats: int) -> Timing:
    """Times a training step by the distance of the events between steps, without waiting in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            marks.append(time.perf_counter())
        return _summary([1e3 * (stop - start) for start, stop in pairwise(marks)])
    events = [_event()]
    for _ in range(repeats):
        step()
        events.append(_event())
    torch.cuda.synchronize(device)
    return _summary([start.elapsed_time(stop) for start, stop in pairwise(events)])


def _summary(times: Sequence[float], graphed: bool = False) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered), graphed
    )


def _cpu_times(calls: Sequence[Call], seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < LEAST_REPEATS or (sum(times) < 1e3 * seconds and len(times) < MOST_REPEATS):
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times(calls: Sequence[Call], seconds: float, device: torch.device) -> list[float]:
    """Each call between two events; what ran before it overwrote the L2 cache and lets the host run ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    first = _between_events(calls[0], flush)
    torch.cuda.synchronize(device)
    guess = max(first[0].elapsed_time(first[1]), 1e-3)
    repeats = min(max(int(1e3 * seconds / guess), LEAST_REPEATS), MOST_REPEATS)
    pairs = [_between_events(calls[i % len(calls)], flush) for i in range(repeats)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) for start, stop in pairs]


def _between_events(call: Call, flush: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    flush.zero_()
    start = _event()
    call()
    return start, _event()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _per_graph(calls: Sequence[Call]) -> int:
    return len(calls) * max(1, CALLS_PER_GRAPH // len(calls))


def _captured(calls: Sequence[Call]) -> Call | None:
    """A replay of `_per_graph` calls in turn; None when they cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        with capture() as graph:
            for i in range(_per_graph(calls)):
                calls[i % len(calls)]()
        graph.replay()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # something in it waits for the device
        torch.cuda.synchronize()
        return None
    return graph.replay
