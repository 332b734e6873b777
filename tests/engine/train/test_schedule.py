"""The learning rate at its corners, and when things are due."""

from itertools import pairwise

import pytest

from affmae_engine.train.schedule import due, learning_rate, times_due, warmup_length


def rate(step: int, *, total: int = 1000, warmup: int = 100) -> float:
    return learning_rate(step, total_steps=total, warmup_steps=warmup, peak=1.0, minimum=0.1)


def test_warmup_rises_linearly_to_the_peak() -> None:
    assert rate(0) == pytest.approx(0.01)
    assert rate(49) == pytest.approx(0.5)
    assert rate(99) == rate(100) == 1.0


def test_cosine_falls_to_the_minimum_at_the_last_step() -> None:
    assert rate(999) == pytest.approx(0.1)
    assert rate(549) == pytest.approx(0.55, abs=2e-3)
    values = [rate(step) for step in range(100, 1000)]
    assert all(a >= b for a, b in pairwise(values))


def test_warmup_is_a_tenth_of_a_short_run() -> None:
    assert warmup_length(500, 10_000) == 500
    assert warmup_length(500, 4_000) == 400
    assert warmup_length(500, 5) == 0
    assert rate(0, total=1) == 1.0
    assert rate(4, total=5, warmup=500) == pytest.approx(0.1)


def test_no_warmup() -> None:
    assert rate(0, warmup=0) == 1.0


def test_a_longer_run_lies_higher_at_the_same_step() -> None:
    assert rate(900, total=2000) > rate(900)


@pytest.mark.parametrize(
    ("every", "step", "expected"),
    [(10, 20, True), (10, 21, False), (10, 25, True), (0, 20, False), (0, 25, True), (100, 25, True)],
)
def test_due_includes_the_last_step_and_zero_means_only_then(every: int, step: int, expected: bool) -> None:
    assert due(every, step, 25) is expected


@pytest.mark.parametrize("every", [0, 1, 3, 4, 50])
def test_times_due_counts_what_is_due(every: int) -> None:
    for total in (1, 12, 13):
        for step in range(1, total + 2):
            expected = sum(due(every, later, total) for later in range(step, total + 1))
            assert times_due(every, step, total) == expected
