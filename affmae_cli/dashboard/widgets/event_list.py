"""The last notable events of a run, the newest below; as many as fit."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.text import Text
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from affmae_cli.output import printable
from affmae_engine.events import CheckpointSaved, Evaluated, Event, RequestTaken, RunEnded, Warned
from affmae_engine.train.report import line


class EventList(Widget):
    """One line an event: time, sign, text."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        f"events--{part}" for part in ("time", "plain", "saved", "warning", "failed", "held-out")
    }

    events: reactive[tuple[Event, ...]] = reactive(())

    def on_mount(self) -> None:
        """Name the box."""
        self.border_title = Content("events")

    def render(self) -> Text:
        """The newest events."""
        shown = [(event, line(event, 0)) for event in self.events[-self.size.height :]] if self.size.height else []
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        if not shown:
            text.append("nothing has happened yet", self.get_component_rich_style("events--time"))
        for number, (event, words) in enumerate(shown):
            text.append("\n" if number else "")
            at = time.strftime("%H:%M:%S", time.localtime(event.time))
            text.append(f"{at} ", self.get_component_rich_style("events--time"))
            kind, sign = _kind(event)
            text.append(
                f"{sign} {printable(words).replace(chr(10), ' ')}", self.get_component_rich_style(f"events--{kind}")
            )
        return text


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
