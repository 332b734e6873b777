"""The first lines of every tab: what the run is doing, how far it is, how long it will take."""

from __future__ import annotations

import math
import textwrap
from typing import ClassVar

from rich.text import Text
from textual.geometry import Size
from textual.reactive import reactive
from textual.widget import Widget

from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.signs import SIGNS
from affmae_cli.dashboard.view import RunView
from affmae_engine.runtime.formatting import duration


class StatusLine(Widget):
    """State, name and figures; below a bar, or what is to be said and done about a run that does not simply run."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *(f"status--{kind}" for kind in SIGNS),
        "status--name",
        "status--figures",
        "status--bar",
        "status--track",
        "status--paused",
    }

    view: reactive[RunView | None] = reactive(None)
    paused: reactive[bool] = reactive(False)
    asked: reactive[str] = reactive("")

    def watch_view(self, before: RunView | None, after: RunView | None) -> None:
        """Make room for what is to be said."""
        if len(self._said(before)) != len(self._said(after)):
            self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Two lines, more where the state needs explaining."""
        return 1 + max(1, len(self._said(self.view, width)))

    def render(self) -> Text:
        """All lines."""
        view, width, style = self.view, self.size.width, self.get_component_rich_style
        if view is None:
            return Text("reading the run ...", end="")
        first = Text(no_wrap=True, overflow="ellipsis", end="")
        first.append(f"{SIGNS[view.status.kind]} {view.status.kind}", style(f"status--{view.status.kind}"))
        first.append(f"  {one_line(view.task) or 'run'} ", style("status--figures"))
        first.append(one_line(view.root.name), style("status--name"))
        right = Text(figures(view), style("status--figures"))
        first.truncate(max(8, width - right.cell_len - 2), overflow="ellipsis", pad=True)
        first.append("  ").append_text(right)
        said = self._said(view, width)
        lines = [Text(line, style("status--figures")) for line in said] or [self._bar_line(view, width)]
        return Text("\n", end="").join([first, *lines])

    def _said(self, view: RunView | None, width: int | None = None) -> list[str]:
        """What is to be said in whole lines: on a run that does not simply run."""
        if view is None or view.opening or view.status.kind in ("waiting", "running", "finished"):
            return []
        text = one_line(view.status.text)
        lines = textwrap.wrap(text, max(20, width or self.size.width))
        return [*lines, *textwrap.wrap(one_line(view.status.hint), max(20, width or self.size.width))]

    def _bar_line(self, view: RunView, width: int) -> Text:
        style = self.get_component_rich_style
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        length = min(40, width // 4)
        done = min(length, round(view.progress * length))
        text.append("━" * done, style("status--bar")).append("─" * (length - done), style("status--track"))
        if self.paused:
            text.append("  view paused, p goes on", style("status--paused"))
        if self.asked:
            text.append(f"  {self.asked}", style("status--paused"))
        else:
            text.append(f"  {one_line(view.status.text)}", style("status--figures"))
        text.truncate(width, overflow="ellipsis")
        return text


def figures(view: RunView) -> str:
    """How far the run is, and how long it takes."""
    if not view.total_steps:
        return ""
    left = ""
    if not view.status.ended:
        left = f"  {duration(view.eta_s)} left" if math.isfinite(view.eta_s) else "  time left not known yet"
    return f"step {view.step:,} of {view.total_steps:,}  {view.progress:.0%}  {duration(view.elapsed_s)}{left}"
