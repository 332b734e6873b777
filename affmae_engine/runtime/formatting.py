"""Durations, scores and rates as short text."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """A duration in two units at most: 45s, 12m, 1h05m, 3d04h; "-" when it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, whole = int(seconds) // 60, int(seconds)
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m{whole % 60:02d}s" if minutes < 10 else f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes // 60 % 24:02d}h"


def number(value: float) -> str:
    """A loss or a score in six characters or so."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def rate(value: float) -> str:
    """Images per second with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
