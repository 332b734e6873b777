"""Curves over the steps of a run: log axis, smoothing, zoom and pan by keys (the screen's) and by the wheel."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.content import Content
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from affmae_cli.dashboard.frame import AXIS_INK, Frame, draw_frame
from affmae_cli.dashboard.plot import GRID_INK, NO_INK, Trace, extent, fitting_view, layers, value_at
from affmae_cli.dashboard.ticks import count_label
from affmae_cli.dashboard.zoom import Zoom
from affmae_engine.train.report import number

INKS = 6
_PARTS = {AXIS_INK: "chart--axis", GRID_INK: "chart--grid", NO_INK: "chart--blank"}


class Chart(Widget):
    """Draws `traces`, the first one on top; draws anew only when a reactive or its size changes."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *_PARTS.values(),
        *(f"chart--{kind}-{ink}" for kind in ("series", "raw") for ink in range(INKS)),
    }

    traces: reactive[tuple[Trace, ...]] = reactive(())
    log: reactive[bool] = reactive(False)
    smoothing: reactive[bool] = reactive(True)
    zoom: reactive[Zoom] = reactive(Zoom())

    def __init__(self, title: str, *, empty: str = "nothing to draw yet", floor: float | None = None, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.border_title = Content(title)
        self._empty, self._floor = empty, floor
        self._frame: Frame | None = None

    def _invalidate(self) -> None:
        self._frame = None
        self.border_subtitle = Content(self._state())

    watch_traces = watch_log = watch_smoothing = watch_zoom = on_resize = _invalidate

    def zoom_by(self, direction: int, at: float | None = None) -> None:
        """Zoom in (1), out (-1) or to the whole run (0), around step `at`."""
        reach = extent(self.traces)
        if reach is not None:
            self.zoom = Zoom() if direction == 0 else (self.zoom.closer if direction > 0 else self.zoom.wider)(*reach, at)

    def pan(self, share: float) -> None:
        """Move the visible window by a share of its width."""
        reach = extent(self.traces)
        if reach is not None:
            self.zoom = self.zoom.panned(*reach, share)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zoom in where the pointer is."""
        self.zoom_by(1, self._step_at(event))
        event.stop()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Zoom out where the pointer is."""
        self.zoom_by(-1, self._step_at(event))
        event.stop()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Show the values under the pointer."""
        step = self._step_at(event)
        values = "" if step is None else "  ".join(f"{c.name} {number(value_at(c, step))}" for c in self.traces)
        self.border_subtitle = Content(f"step {count_label(step)}  {values}" if step is not None else self._state())

    def on_leave(self) -> None:
        """Show what the chart shows."""
        self.border_subtitle = Content(self._state())

    def render_line(self, y: int) -> Strip:
        """One line of the chart."""
        if self._frame is None:
            self._frame = self._draw()
        lines = self._frame.lines if self._frame else [[(self._empty, AXIS_INK, False)]]
        line = lines[y] if y < len(lines) else []
        strip = Strip([Segment(text, self._style(ink, faint)) for text, ink, faint in line])
        return strip.adjust_cell_length(self.size.width, self._style(NO_INK, False))

    def _draw(self) -> Frame | None:
        reach = extent(self.traces)
        if reach is None:
            return None
        drawn = layers(self.traces, *self.zoom.window(*reach), smoothing=self.smoothing)
        view = fitting_view(drawn, *self.zoom.window(*reach), log=self.log, floor=self._floor)
        return view and draw_frame(drawn, view, *self.size)

    def _style(self, ink: int, faint: bool) -> Style:
        name = _PARTS.get(ink) or f"chart--{'raw' if faint else 'series'}-{ink % INKS}"
        return self.get_component_rich_style(name)

    def _step_at(self, event: events.MouseEvent) -> float | None:
        inside = event.get_content_offset(self)
        return self._frame.x_at(inside.x) if inside and self._frame else None

    def _state(self) -> str:
        reach = extent(self.traces)
        if reach is None:
            return ""
        x0, x1 = self.zoom.window(*reach)
        parts = ["log axis" if self.log else "", "smoothed" if self.smoothing else ""]
        parts.append("" if self.zoom.whole else f"steps {count_label(x0)} to {count_label(x1)}")
        return ", ".join(part for part in parts if part)
