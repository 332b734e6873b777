"""Which part of a run a chart shows: pure arithmetic on step numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

FACTOR = 2.0
_CLOSEST = 10.0  # steps in view at least


@dataclass(frozen=True)
class Zoom:
    """A window on the range [first, last] of a run.

    span: width in steps; None shows the whole run. right: its right edge; None follows the newest step.
    """

    span: float | None = None
    right: float | None = None

    @property
    def whole(self) -> bool:
        """Whether everything is shown."""
        return self.span is None

    def window(self, first: float, last: float) -> tuple[float, float]:
        """The visible range."""
        if self.span is None or self.span >= last - first:
            return first, last
        right = last if self.right is None else min(max(self.right, first + self.span), last)
        return right - self.span, right

    def turned(self, direction: int, first: float, last: float, at: float | None = None) -> Zoom:
        """Closer (1), wider (-1), or the whole run (0)."""
        scaled = {1: self.closer, -1: self.wider}.get(direction)
        return scaled(first, last, at) if scaled else Zoom()

    def closer(self, first: float, last: float, at: float | None = None) -> Zoom:
        """Half as wide around `at`; by default around the newest step when that is followed, else around the middle."""
        return self._scaled(first, last, 1 / FACTOR, at)

    def wider(self, first: float, last: float, at: float | None = None) -> Zoom:
        """Twice as wide, at most the whole run."""
        return self._scaled(first, last, FACTOR, at)

    def panned(self, first: float, last: float, share: float) -> Zoom:
        """Moved by `share` of its width; at the right end it follows the newest step again."""
        if self.span is None:
            return self
        right = self.window(first, last)[1] + share * self.span
        return replace(self, right=None if right >= last else max(right, first + self.span))

    def _scaled(self, first: float, last: float, factor: float, at: float | None) -> Zoom:
        x0, x1 = self.window(first, last)
        span = max((x1 - x0) * factor, min(_CLOSEST, last - first))
        if span >= last - first:
            return Zoom()
        if at is None and self.right is None:
            return Zoom(span)
        at = (x0 + x1) / 2 if at is None else at
        right = at + (x1 - at) * span / (x1 - x0)
        return Zoom(span, None if right >= last else max(right, first + span))


@dataclass(frozen=True)
class ChartSettings:
    """How all charts of a screen are drawn."""

    log: bool = False
    smoothing: bool = True
    zoom: Zoom = Zoom()
