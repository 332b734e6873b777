"""The first lines of every tab: what the run is doing, how far it is, how long it will take."""

from __future__ import annotations

import math
from typing import ClassVar

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from affmae_cli.dashboard.signs import SIGNS
from affmae_cli.dashboard.view import RunView
from affmae_cli.output import printable
from affmae_engine.train.report import duration


class StatusLine(Widget):
    """Two lines: state, name, progress; and a bar with the sentence on the state, or what can be done."""

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

    def render(self) -> Text:
        """Both lines."""
        view, width = self.view, self.size.width
        if view is None:
            return Text("reading the run ...", end="")
        first = Text(no_wrap=True, overflow="ellipsis", end="")
        style = self.get_component_rich_style
        first.append(f"{SIGNS[view.status.kind]} {view.status.kind}", style(f"status--{view.status.kind}"))
        first.append(f"  {view.task or 'run'} ", style("status--figures"))
        first.append(_shown(view.root.name), style("status--name"))
        right = Text(self._figures(view), style("status--figures"))
        first.truncate(max(8, width - right.cell_len - 2), overflow="ellipsis", pad=True)
        first.append("  ").append_text(right)
        return first.append("\n").append_text(self._second(view, width))

    def _figures(self, view: RunView) -> str:
        if not view.total_steps:
            return ""
        left = ""
        if not view.status.ended:
            left = f"  {duration(view.eta_s)} left" if math.isfinite(view.eta_s) else "  time left not known yet"
        return f"step {view.step:,} of {view.total_steps:,}  {view.progress:.0%}  {duration(view.elapsed_s)}{left}"

    def _second(self, view: RunView, width: int) -> Text:
        style = self.get_component_rich_style
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        length = min(40, width // 3)
        done = min(length, round(view.progress * length))
        text.append("━" * done, style("status--bar")).append("─" * (length - done), style("status--track"))
        if self.paused:
            text.append("  view paused (p goes on)", style("status--paused"))
        elif self.asked:
            text.append(f"  {self.asked}", style("status--paused"))
        hint = f"  {view.status.hint}" if view.status.hint else ""
        text.append(f"  {_shown(view.status.text)}{_shown(hint)}", style("status--figures"))
        text.truncate(width, overflow="ellipsis")
        return text


def _shown(text: str) -> str:
    return printable(text).replace("\n", " ")
