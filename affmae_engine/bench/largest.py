"""The largest batch that fits, by doubling and then bisection."""

from __future__ import annotations

from collections.abc import Callable

PRECISION = 16
"""The answer is exact to one part in this many: every trial may cost a compilation."""


def largest_that_fits(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number for which `fits` holds, to one part in `PRECISION`; 0 when it holds for none.

    Args:
        fits: whether a batch of that many images fits; true below some number and false above.
        guess: the first trial.
        most: no larger number is tried.
    """
    low, high = 0, most + 1
    trial = min(max(guess, 1), most)
    while high - low > max(1, low // PRECISION):
        if fits(trial):
            low = trial
        else:
            high = trial
        if high > most:
            trial = min(2 * low, most)
        else:
            trial = (low + high) // 2 if low else high // 2
    return low
