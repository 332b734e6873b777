"""The last notable events of a run, the newest below; as many as fit."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.widgets.title import retitle
from affmae_engine.events import CheckpointSaved, Evaluated, Event, RequestTaken, RunEnded, Warned, line


class EventList(Widget):
    """One line an event: time, sign, text."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        f"events--{part}" for part in ("time", "plain", "saved", "warning", "failed", "held-out")
    }

    events: reactive[tuple[Event, ...]] = reactive(())

    def on_mount(self) -> None:
        """Name the box."""
        retitle(self, "events")

    def render(self) -> Text:
        """The newest events."""
        shown = [(event, line(event, 0)) for event in self.events[-self.size.height :]] if self.size.height else []
        style = self.get_component_rich_style
        if not shown:
            return Text("nothing has happened yet", style("events--time"), end="")
        lines = []
        for event, words in shown:
            kind, sign = _kind(event)
            text = Text(time.strftime("%H:%M:%S ", time.localtime(event.time)), style("events--time"))
            text.append(f"{sign} {one_line(words)}", style(f"events--{kind}"))
            text.truncate(self.size.width, overflow="ellipsis")
            lines.append(text)
        return Text("\n", end="").join(lines)


def _kind(event: Event) -> tuple[str, str]:
    """(component class, sign) of an event."""
    match event:
        case Warned():
            return "warning", "▲"
        case CheckpointSaved():
            return "saved", "✔"
        case RequestTaken():
            return "saved", "→"
        case Evaluated():
            return "held-out", "◆"
        case RunEnded():
            return ("saved", "■") if event.status != "failed" else ("failed", "✖")
        case _:
            return "plain", "·"
