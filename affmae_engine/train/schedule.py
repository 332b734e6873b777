"""The learning rate of a step and the rule for when things happen: pure functions of the step number."""

from __future__ import annotations

import math


def warmup_length(warmup_steps: int, total_steps: int) -> int:
    """Steps of warm-up: as asked, but a tenth of the run when the run is shorter than ten times that."""
    return min(warmup_steps, total_steps // 10)


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Learning rate of the step that follows `step` finished ones (so 0 is the first): linear warm-up, then a cosine.

    The first step takes peak / warm-up, the last step of the warm-up `peak`, the last step of the run `minimum`.
    A run that is resumed with more steps continues on the longer cosine, which lies higher at the same step.
    """
    warmup = warmup_length(warmup_steps, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def due(every: int, step: int, total_steps: int) -> bool:
    """Whether something that happens `every` so many steps happens after `step`; always after the last, 0 only then."""
    return step == total_steps or (every > 0 and step % every == 0)
