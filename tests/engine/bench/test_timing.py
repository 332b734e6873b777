"""Clocks and ceilings."""

import time

import pytest
import torch

from affmae_engine.bench.ceilings import Ceilings, measure_ceilings
from affmae_engine.bench.timing import LEAST_REPEATS, measure, step_times

CPU = torch.device("cpu")


def test_median_of_a_known_wait() -> None:
    timing = measure([lambda: time.sleep(0.004)], CPU, seconds=0.05)
    assert 4 <= timing.ms < 40
    assert timing.low_ms <= timing.ms <= timing.high_ms
    assert timing.repeats >= LEAST_REPEATS and not timing.graphed


def test_calls_take_turns() -> None:
    called: list[int] = []
    measure([lambda: called.append(0), lambda: called.append(1)], CPU, seconds=0.0, warmup=1)
    assert called == [0, 1, 0, 1, 0, 1, 0]


def test_steps_are_counted() -> None:
    called: list[int] = []
    timing = step_times(lambda: called.append(0), CPU, 4)
    assert len(called) == timing.repeats == 4


def test_the_bound_is_what_limits() -> None:
    ceilings = Ceilings(gb_s=1000, tflop_s=100)
    assert ceilings.bound_ms(gigabytes=2, gigaflops=1) == pytest.approx(2)
    assert ceilings.bound_ms(gigabytes=0, gigaflops=500) == pytest.approx(5)


def test_ceilings_are_positive() -> None:
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.gb_s > 0.1 and ceilings.tflop_s > 1e-4


@pytest.mark.gpu
def test_graphs_and_events_agree() -> None:
    device = torch.device("cuda")
    tensor = torch.zeros(2**28, dtype=torch.int8, device=device)
    graphed = measure([tensor.zero_], device, graph=True)
    plain = measure([tensor.zero_], device)
    assert graphed.graphed and not plain.graphed
    assert graphed.ms == pytest.approx(plain.ms, rel=0.3)


@pytest.mark.gpu
def test_what_waits_for_the_device_is_timed_without_a_graph() -> None:
    device = torch.device("cuda")
    tensor = torch.ones(8, device=device)
    assert not measure([lambda: tensor.sum().item()], device, graph=True, seconds=0.01).graphed
    assert tensor.sum().item() == 8
