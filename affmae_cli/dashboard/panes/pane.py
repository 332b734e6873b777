"""What every tab has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text
from textual.containers import Vertical
from textual.widgets import Static

from affmae_cli.dashboard.colors import readable
from affmae_cli.dashboard.text import cut, one_line

if TYPE_CHECKING:
    from affmae_cli.dashboard.run_model import RunModel


History = Callable[[int], Text]
"""Draws a history in so many columns."""


class Pane(Vertical, can_focus=True):
    """A tab. The screen calls `take` after the run was read, and when the tab is seen again."""

    model: RunModel | None = None

    def take(self, model: RunModel) -> None:
        self.model = model

    def focus_first(self) -> None:
        self.focus()

    def on_resize(self) -> None:
        if self.model is not None:
            self.take(self.model)


class Lines(Static):
    """Text that changes often; laid out anew only when its height changes, since that redraws the whole screen."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__("", id=id, classes=classes, markup=False)
        self._put: tuple[Text, int] = Text(), -1

    def put(self, text: Text) -> None:
        """Show this text."""
        width = max(1, self.size.width)
        height = sum(max(1, -(-len(row) // width)) for row in text.plain.split("\n"))
        if (text, height) != self._put:
            self.update(text, layout=height != self._put[1])
            self._put = text, height


class Panel(Lines):
    """Lines of text below a title."""

    def __init__(self, title: str = "", *, id: str | None = None) -> None:
        super().__init__(id=id, classes="panel")
        self.border_title = title

    def paint(self, color: str) -> str:
        """A color that can be seen on the background, as a Rich style."""
        return readable(color, self.background_colors[1], self.styles.color).hex


def figure(label: str, value: str, width: int, *, history: History | None = None, style: str = "") -> Text:
    """One line: a label, its value, and in the room that is left its history."""
    line = Text(no_wrap=True, end="")
    line.append(f"{label:<12}", "dim").append(cut(one_line(value), max(0, width - 12)), style)
    room = min(40, width - line.cell_len - 2)
    if history is not None and room >= 6:
        line.append("  ").append_text(history(room))
    return line


def bar(share: float, width: int, color: str) -> Text:
    """A bar that is filled up to `share` (0 to 1)."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text().append("━" * filled, color).append("─" * (width - filled), "dim")


def in_columns(lines: list[Text], width: int, columns: int) -> Text:
    """Lines one below the other in columns beside each other, in reading order downwards."""
    rows = -(-len(lines) // columns)
    each = width // columns
    found = []
    for row in range(rows):
        parts = [line.copy() for line in lines[row::rows]]
        for part in parts[:-1]:
            part.truncate(each - 2, pad=True)
        found.append(Text("  ").join(parts))
    return Text("\n").join(found)
