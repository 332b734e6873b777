"""Judges what a run logs: steps that are not finite, and losses that jump.

A step with a non-finite loss or gradient is left out by the optimizer (`step.py`) and counted here. Unusual: a jump of
the loss is measured against the spread of the losses before it, so the same factor suits a smooth pretraining and a
noisy finetuning. It is told, not acted upon. What is remembered is part of a checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from affmae_engine.config import TrainConfig
from affmae_engine.train.metrics import Means

REMEMBERED_LOSSES = 50
FEWEST_LOSSES = 10
"""Logged losses before a jump can be told from the fast fall at the beginning."""
SMALLEST_SPREAD = 0.01
"""Spread of the losses that is assumed at least, relative to their median."""
REMEMBERED_STEPS = 1000


@dataclass
class Health:
    """The last logged losses, and [steps, of which skipped] of the last logged windows."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_LOSSES))
    windows: deque[list[int]] = field(default_factory=deque)

    def jump(self, loss: float, factor: float) -> float | None:
        """The median that `loss` exceeds by more than `factor` spreads; None when it does not. Remembers `loss`."""
        found = None
        if factor and math.isfinite(loss) and len(self.losses) >= FEWEST_LOSSES:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(value - median) for value in self.losses)
            spread = max(1.4826 * deviation, SMALLEST_SPREAD * abs(median))  # of normal noise: its standard deviation
            found = median if loss > median + factor * spread else None
        if math.isfinite(loss):
            self.losses.append(loss)
        return found

    def too_many_skipped(self, means: Means, train: TrainConfig, *, overflows_expected: bool) -> str:
        """Why the run must stop, or "".

        Args:
            means: of the window that was just logged; its counts are remembered.
            train: the limits.
            overflows_expected: with a loss scaler, which finds its scale by them; only a long streak counts then.
        """
        self.windows.append([means.steps, means.skipped_in_window])
        while sum(steps for steps, _ in self.windows) - self.windows[0][0] >= REMEMBERED_STEPS:
            self.windows.popleft()
        if means.longest_streak >= train.max_nonfinite:
            return f"{means.longest_streak} steps in a row had a non-finite loss or gradient"
        skipped = sum(skipped for _, skipped in self.windows)
        judged = train.max_nonfinite_share > 0 and not overflows_expected
        if judged and skipped > train.max_nonfinite_share * REMEMBERED_STEPS:
            return f"{skipped} of the last {REMEMBERED_STEPS} steps had a non-finite loss or gradient"
        return ""

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"losses": list(self.losses), "windows": [list(window) for window in self.windows]}

    def load_json(self, value: dict[str, Any]) -> None:
        """Take over what `to_json` returned."""
        self.losses.clear()
        self.losses.extend(float(loss) for loss in value["losses"])
        self.windows = deque([int(steps), int(skipped)] for steps, skipped in value["windows"])
