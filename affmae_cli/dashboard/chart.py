"""A chart as a widget. All charts over the same x share one `ChartView`: zoom, cursor, logarithmic axis, smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from affmae_cli.dashboard.charts import ChartSpec
from affmae_cli.dashboard.colors import readable
from affmae_cli.dashboard.plot import AXIS, CURSOR, GRID, ChartView, Curve, Drawing, draw
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import count

_FEWEST = 10.0  # x in view at least
_ZOOM, _PAN, _MOVE = 2.0, 0.25, 1 / 40


class Chart(Widget, can_focus=True):
    """Draws the curves of `spec`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "cursor(-1)", "Cursor", key_display="←→", tooltip="Move the cursor of all charts"),
        Binding("right", "cursor(1)", "Cursor", show=False),
        Binding("plus,equals_sign", "zoom(1)", "Zoom", key_display="+-", tooltip="Zoom in around the cursor"),
        Binding("minus", "zoom(-1)", "Zoom out", show=False),
        Binding("0", "zoom(0)", "All", tooltip="The whole run, without a cursor"),
        Binding("l", "log", "Log", tooltip="Logarithmic or linear axis"),
        Binding("m", "smooth", "Smooth", tooltip="Moving means over the values, or the values alone"),
        Binding("enter", "screen.enlarge", "Full screen", tooltip="The chart on the whole screen"),
    ]
    view: reactive[ChartView] = reactive(ChartView())

    class ViewChanged(Message):
        """All charts over this x are to be seen this way."""

        def __init__(self, x_name: str, view: ChartView) -> None:
            super().__init__()
            self.x_name, self.view = x_name, view

    def __init__(self, spec: ChartSpec, *, id: str | None = None) -> None:
        super().__init__(id=id, classes="panel")
        self.spec = spec
        self.curves: Sequence[Curve] = ()
        self.model: RunModel | None = None
        self._drawing: Drawing | None = None
        self._drawn: object = None

    def take(self, model: RunModel, spec: ChartSpec | None = None) -> None:
        self.spec, self.model = spec or self.spec, model
        self.show(self.spec.curves(model))

    def show(self, curves: Sequence[Curve]) -> None:
        self.curves, self._drawn = curves, None
        self._retitle()
        self.refresh()

    def on_mount(self) -> None:
        views: Mapping[str, ChartView] = getattr(self.app, "chart_views", {})
        self.view = views.get(self.spec.x_name, self.view)

    def watch_view(self) -> None:
        self._drawn = None
        self._retitle()

    def on_resize(self) -> None:
        self._drawn = None

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._drawn = None

    def render_line(self, y: int) -> Strip:
        if self._drawn is None:
            self._drawn = self._draw()
        strips = self._drawn
        assert isinstance(strips, list)
        return strips[y] if y < len(strips) else Strip.blank(self.size.width, self.rich_style)

    @property
    def extent(self) -> tuple[float, float]:
        """First and last x of all curves."""
        known = [curve.x_N for curve in self.curves if len(curve.x_N)]
        return (float(min(x[0] for x in known)), float(max(x[-1] for x in known))) if known else (0.0, 1.0)

    def action_log(self) -> None:
        self._see(replace(self.view, log=not self.view.log))

    def action_smooth(self) -> None:
        self._see(replace(self.view, smoothing=not self.view.smoothing))

    def action_cursor(self, direction: int) -> None:
        """Move the cursor by a fortieth of what is seen; the view follows it."""
        first, last = self.view.span or self.extent
        low, high = self.extent
        at = last if self.view.cursor is None else self.view.cursor + direction * (last - first) * _MOVE
        at = min(max(at, low), high)
        span = self.view.span
        if span is not None and not span[0] <= at <= span[1]:
            span = self._within(span[0] + direction * (last - first) * _PAN, last - first)
        self._see(replace(self.view, cursor=at, span=span))

    def action_zoom(self, direction: int, at: float | None = None) -> None:
        """Half as much (1), twice as much (-1) or everything (0), around `at` or the cursor."""
        low, high = self.extent
        first, last = self.view.span or (low, high)
        if direction == 0:
            self._see(replace(self.view, span=None, cursor=None))
            return
        width = max((last - first) * _ZOOM**-direction, min(_FEWEST, high - low))
        if width >= high - low:
            self._see(replace(self.view, span=None))
            return
        at = at if at is not None else self.view.cursor if self.view.cursor is not None else last
        share = (at - first) / (last - first)
        self._see(replace(self.view, span=self._within(at - share * width, width)))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        at = self._x_at(event)
        if at is not None:
            self._see(replace(self.view, cursor=at))

    def on_leave(self) -> None:
        if self.view.cursor is not None:
            self._see(replace(self.view, cursor=None))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zoom in with Ctrl; without it the list of charts scrolls."""
        if event.ctrl:
            event.stop()
            self.action_zoom(1, self._x_at(event))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        if event.ctrl:
            event.stop()
            self.action_zoom(-1, self._x_at(event))

    def _see(self, view: ChartView) -> None:
        self.post_message(self.ViewChanged(self.spec.x_name, view))

    def _within(self, first: float, width: float) -> tuple[float, float]:
        low, high = self.extent
        first = min(max(first, low), high - width)
        return first, first + width

    def _x_at(self, event: events.MouseEvent) -> float | None:
        inside = event.get_content_offset(self)
        return self._drawing.x_at(inside.x) if inside and self._drawing else None

    def _retitle(self) -> None:
        view, parts = self.view, []
        if view.cursor is not None:
            parts.append(f"{self.spec.x_name} {view.cursor:,.0f}")
        if view.span is not None:
            parts.append(f"{self.spec.x_name}s {count(view.span[0])} to {count(view.span[1])}")
        if view.log and self.spec.may_log:
            parts.append("log axis")
        title = self.spec.title + (f"  ({', '.join(parts)})" if parts else "")
        self.border_title = title.replace("[", r"\[")

    def _draw(self) -> list[Strip]:
        width, height = self.size
        spec, blank = self.spec, self.rich_style
        self._drawing = draw(
            self.curves,
            width,
            height,
            self.view,
            floor=spec.floor,
            may_log=spec.may_log,
            may_smooth=spec.may_smooth,
        )
        background, foreground = self.background_colors[1], self.styles.color
        rule = background.blend(foreground, 0.2)
        quiet = Style(color=background.blend(foreground, 0.6).rich_color)
        if self._drawing is None:
            text = self._why_empty()
            return [Strip([Segment(text[:width], quiet)]).adjust_cell_length(width, blank)]
        styles: dict[tuple[int, bool], Style] = {
            (AXIS, False): quiet,
            (GRID, False): Style(color=rule.rich_color),
            (CURSOR, False): Style(color=quiet.color),
        }
        for ink, curve in enumerate(self.curves_drawn):
            color = foreground if curve.color == "foreground" else readable(curve.color, background, foreground)
            bold = ink == 0 and len(self.curves_drawn) > 1
            styles[ink, False] = Style(color=color.rich_color, bold=bold)
            styles[ink, True] = Style(color=background.blend(color, 0.4).rich_color)
        return [
            Strip([Segment(text, styles.get((ink, faint), blank)) for text, ink, faint in line])
            .adjust_cell_length(width, blank)
            .apply_style(blank)
            for line in self._drawing.lines
        ]

    def _why_empty(self) -> str:
        values = [curve.y_3N[0] for curve in self.curves if len(curve.x_N)]
        finite = np.concatenate([value[np.isfinite(value)] for value in values]) if values else np.zeros(0)
        if not values:
            return self.spec.empty
        if not len(finite):
            return "no finite value: all are NaN or infinite"
        if self.view.log and self.spec.may_log and finite.max() <= 0:
            return "no value above zero, as a logarithmic axis needs"
        return "nothing in this part" if self.view.span is not None else "not enough room"

    @property
    def curves_drawn(self) -> list[Curve]:
        """The curves that have points, as the drawing numbers them."""
        return [curve for curve in self.curves if len(curve.x_N)]
