"""The number of steps, the learning rate of a step, and when things happen: pure functions of the step number."""

from __future__ import annotations

import math

from affmae_engine.config import RunConfig


def with_steps(config: RunConfig, samples_per_epoch: int) -> RunConfig:
    """The configuration with the number of steps that `train.epochs` means, where it is set."""
    train = config.train
    return config.model_copy(update={"train": train.model_copy(update={"steps": train.length(samples_per_epoch)})})


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


def times_due(every: int, step: int, total_steps: int) -> int:
    """How often something that is `due` happens after the steps from `step` (at least 1) to the last."""
    if step > total_steps:
        return 0
    regular = total_steps // every - (step - 1) // every if every > 0 else 0
    return regular + (0 if every > 0 and total_steps % every == 0 else 1)
