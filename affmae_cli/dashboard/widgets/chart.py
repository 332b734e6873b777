"""Curves over the steps of a run, with log axis, smoothing and zoom. Settings come from outside; the wheel asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from affmae_cli.dashboard.frame import AXIS_INK, Frame, draw_frame
from affmae_cli.dashboard.plot import GRID_INK, NO_INK, Trace, fitting_view, layers, value_at
from affmae_cli.dashboard.ticks import count_label
from affmae_cli.dashboard.widgets.title import retitle
from affmae_cli.dashboard.zoom import ChartSettings
from affmae_engine.runtime.formatting import number

INKS = 6
_PARTS = {AXIS_INK: "chart--axis", GRID_INK: "chart--grid", NO_INK: "chart--blank"}


class Chart(Widget):
    """Draws `traces`, the first one on top; draws anew only when a reactive or its size changes.

    last: the newest step of the run; the whole view is from 0 to there. empty: said while there is no point. may_log,
    may_smooth: whether these settings concern it. unit: of what it is drawn over.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *_PARTS.values(),
        *(f"chart--{kind}-{ink}" for kind in ("series", "raw") for ink in range(INKS)),
    }

    traces: reactive[tuple[Trace, ...]] = reactive(())
    settings: reactive[ChartSettings] = reactive(ChartSettings())
    last: reactive[float] = reactive(0.0)

    @dataclass
    class Wheel(Message):
        """The wheel was turned over `at`, in the chart's unit: 1 to zoom in, -1 out."""

        direction: int
        at: float | None

    def __init__(
        self,
        title: str,
        *,
        empty: str,
        floor: float | None = None,
        may_log: bool = True,
        may_smooth: bool = True,
        unit: str = "step",
        **kwargs: str,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.title, self._empty, self._floor = title, empty, floor
        self._may_log, self._may_smooth, self._unit = may_log, may_smooth, unit
        self._frame: Frame | None = None
        self._retitle()

    def _invalidate(self) -> None:
        self._frame = None
        self._retitle()

    watch_traces = watch_settings = watch_last = on_resize = _invalidate

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Ask to zoom in where the pointer is."""
        self.post_message(self.Wheel(1, self._step_at(event)))
        event.stop()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Ask to zoom out where the pointer is."""
        self.post_message(self.Wheel(-1, self._step_at(event)))
        event.stop()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Show the values under the pointer."""
        step = self._step_at(event)
        values = "" if step is None else "  ".join(f"{t.name} {number(value_at(t, step))}" for t in self.traces)
        self._retitle(f"{self._unit} {count_label(step)}  {values}" if step is not None else "")

    def on_leave(self) -> None:
        """Show what the chart shows."""
        self._retitle()

    def render_line(self, y: int) -> Strip:
        """One line of the chart."""
        frame = self._current()
        lines = frame.lines if frame else [[(self._why_empty(), AXIS_INK, False)]]
        line = lines[y] if y < len(lines) else []
        strip = Strip([Segment(text, self._ink_style(ink, faint)) for text, ink, faint in line])
        return strip.adjust_cell_length(self.size.width, self._ink_style(NO_INK, False))

    def _current(self) -> Frame | None:
        if self._frame is None:  # also when nothing was painted since: a resized widget is told so after its painting
            self._frame = self._draw()
        return self._frame

    def _draw(self) -> Frame | None:
        x0, x1 = self.settings.zoom.window(0.0, self.last)
        log, smoothing = self._applied()
        drawn = layers(self.traces, x0, x1, smoothing=smoothing)
        view = fitting_view(drawn, x0, x1, log=log, floor=self._floor)
        return None if view is None else draw_frame(drawn, view, *self.size)

    def _why_empty(self) -> str:
        """What there is no curve for."""
        x0, x1 = self.settings.zoom.window(0.0, self.last)
        points = [trace.y[(trace.x >= x0) & (trace.x <= x1)] for trace in self.traces]
        here = "" if self.settings.zoom.whole else " in this part"
        if not any(len(trace.x) for trace in self.traces):
            return self._empty
        if not any(map(len, points)):
            return "nothing in this part"
        if not any(np.isfinite(values).any() for values in points):
            return f"no finite value{here}: all are NaN or infinite"
        return f"no value above zero{here}, as a logarithmic axis needs: l changes it"

    def _applied(self) -> tuple[bool, bool]:
        """Whether the height is logarithmic, and the lines smoothed."""
        return self.settings.log and self._may_log, self.settings.smoothing and self._may_smooth

    def _ink_style(self, ink: int, faint: bool) -> Style:
        name = _PARTS.get(ink) or f"chart--{'raw' if faint else 'series'}-{ink % INKS}"
        return self.get_component_rich_style(name)

    def _step_at(self, event: events.MouseEvent) -> float | None:
        inside = event.get_content_offset(self)
        frame = self._current()
        return frame.x_at(inside.x) if inside and frame else None

    def _retitle(self, pointed: str = "") -> None:
        zoom, (log, smoothing) = self.settings.zoom, self._applied()
        parts = ["log axis" if log else "", "smoothed" if smoothing else ""]
        if not zoom.whole:
            parts.append(f"{self._unit}s {' to '.join(map(count_label, zoom.window(0.0, self.last)))}")
        said = pointed or ", ".join(part for part in parts if part)
        retitle(self, f"{self.title}  {said}" if said else self.title)
