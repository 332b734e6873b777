"""Where axes have their ticks and how values on them are written; pure functions."""

from __future__ import annotations

import math


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high], with at most `most` gaps between; where
    fewer than two of them lie within, closer ones with up to twice as many gaps."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or most < 1:
        return []
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * factor for factor in (1, 2, 5, 10, 20)]
    chosen = next(index for index, step in enumerate(steps) if (high - low) / step <= most)
    found = _multiples(steps[chosen], low, high)
    closer = _multiples(steps[chosen - 1], low, high) if len(found) < 2 and chosen > 0 else []
    return closer if len(found) < len(closer) <= 2 * most + 1 else found


def _multiples(step: float, low: float, high: float) -> list[float]:
    """Of `step` within [low, high]."""
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them where there is room; linear ones in a narrow range."""
    if not 0 < low < high or most < 1:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if 2 <= len(found) <= most:
            return found
    if high / low < 10:
        return linear_ticks(low, high, most)
    powers = [10.0**d for d in decades if low <= 10.0**d <= high]
    return powers[:: math.ceil(len(powers) / most)]


def tick_label(value: float, step: float) -> str:
    """A tick's value with the digits that tell it from its neighbours, `step` away; powers for huge and tiny ones."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:.{min(digits, 6)}f}"


def count_label(value: float) -> str:
    """A count in five characters at most: 950, 1.5k, 250k, 1.25M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return (
                f"{value / size:.4g}"[:4].rstrip(".") + unit
                if abs(value) / size < 1000
                else f"{value / size:.0f}{unit}"
            )
    return f"{value:.0f}"
