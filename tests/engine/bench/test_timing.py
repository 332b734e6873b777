"""Clocks and ceilings."""

import time

import pytest
import torch

from affmae_engine.bench.timing import (
    FEWEST_REPEATS,
    MOST_STEPS,
    ROUNDS,
    Ceilings,
    measure_ceilings,
    time_calls,
    time_rounds,
)

CPU = torch.device("cpu")


def test_median_of_a_known_wait() -> None:
    timing = time_calls([lambda: time.sleep(0.004)], CPU, seconds=0.05)
    assert 4 <= timing.low_ms <= timing.ms <= timing.high_ms and timing.ms < 40
    assert timing.repeats >= FEWEST_REPEATS


def test_calls_take_turns() -> None:
    called: list[int] = []
    time_calls([lambda: called.append(0), lambda: called.append(1)], CPU, seconds=0.0, warmup=1)
    assert called == [0, 1, 0, 1, 0, 1, 0]


def test_rounds_of_a_known_wait() -> None:
    called: list[int] = []

    def step() -> None:
        called.append(0)
        time.sleep(0.002)

    timing = time_rounds(step, CPU)
    assert timing.repeats == ROUNDS * MOST_STEPS == len(called) - 1
    assert 2 <= timing.low_ms <= timing.ms <= timing.high_ms


def test_the_bound_is_the_larger_limit() -> None:
    ceilings = Ceilings(gb_s=1000, tflop_s=100)
    assert ceilings.bound_ms(size=2e9, flops=1e9) == pytest.approx(2)
    assert ceilings.bound_ms(size=0, flops=5e11) == pytest.approx(5)


def test_ceilings_are_positive() -> None:
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.gb_s > 0.1 and ceilings.tflop_s > 1e-4


@pytest.mark.gpu
def test_graphs_and_events_agree() -> None:
    device = torch.device("cuda")
    tensor = torch.zeros(2**28, dtype=torch.int8, device=device)
    graphed = time_calls([tensor.zero_], device, graph=True)
    plain = time_calls([tensor.zero_], device)
    assert graphed.ms == pytest.approx(plain.ms, rel=0.3)
