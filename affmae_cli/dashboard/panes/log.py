"""Log: the end of the run's log.txt. It follows new lines at its end and stays put while scrolled up; `/` searches."""

from __future__ import annotations

import re
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from affmae_cli.dashboard.panes.metrics import FilterInput, pattern
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import one_line

_FOUND = Style(reverse=True)


class LogView(ScrollView, can_focus=True):
    """Wrapped lines. wanted: what is marked in them."""

    def __init__(self) -> None:
        super().__init__(id="log-view", classes="panel")
        self.border_title = "log.txt"
        self.wanted: re.Pattern[str] | None = None
        self._lines: list[str] = []
        self._rows: list[str] = []

    def show(self, lines: list[str]) -> None:
        """These lines; the end stays in sight if it is, else what is seen stays where it is."""
        if lines == self._lines:
            return
        at_end, height = self.is_vertical_scroll_end, len(self._rows)
        gone = self._dropped(lines)
        self._lines = lines
        self._wrap()
        if at_end:
            self.scroll_end(animate=False)
        elif gone:
            self.scroll_to(y=max(0, self.scroll_y + len(self._rows) - height - self._added), animate=False)

    def _dropped(self, lines: list[str]) -> bool:
        """Whether lines went at the beginning, as when only the end of a long file is kept."""
        self._added = 0
        if not self._lines or lines[:1] == self._lines[:1]:
            return False
        if self._lines[-1] in lines:
            self._added = len(lines) - 1 - lines.index(self._lines[-1])
        return True

    def on_resize(self) -> None:
        at_end = self.is_vertical_scroll_end
        self._wrap()
        if at_end:
            self.scroll_end(animate=False)

    def _wrap(self) -> None:
        width = max(20, self.scrollable_content_region.width)
        self._rows = [row for text in self._lines for row in _pieces(one_line(text), width)]
        self.virtual_size = Size(width, len(self._rows))
        self.refresh()

    def action_scroll_end(self) -> None:
        """To the end at once: lines that come during an animation would leave the end out of sight."""
        self.scroll_end(animate=False, immediate=True)

    def find(self, direction: int) -> bool:
        """Scroll to the next (1) or the previous (-1) line with what is wanted; False if there is none."""
        if self.wanted is None:
            return False
        found = [i for i, row in enumerate(self._rows) if self.wanted.search(row)]
        here = round(self.scroll_y)
        further = [i for i in found if (i > here if direction > 0 else i < here)]
        if further:
            self.scroll_to(y=further[0] if direction > 0 else further[-1], animate=False, immediate=True)
        return bool(found)

    def render_line(self, y: int) -> Strip:
        number, blank = y + round(self.scroll_y), self.rich_style
        text = self._rows[number] if number < len(self._rows) else ""
        style = blank + Style(bold=True) if " ERROR " in text or " WARNING " in text else blank
        segments, at = [], 0
        for match in self.wanted.finditer(text) if self.wanted else ():
            if match.end() > match.start():
                segments += [Segment(text[at : match.start()], style), Segment(match[0], style + _FOUND)]
                at = match.end()
        return Strip([*segments, Segment(text[at:], style)]).adjust_cell_length(self.size.width, blank)


class LogPane(Pane):
    """The log with a line to search in it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "search", "Search", key_display="/"),
        Binding("n", "find(1)", "Next"),
        Binding("N", "find(-1)", "Previous", key_display="N"),
        Binding("end", "end", "Newest"),
    ]

    def compose(self) -> ComposeResult:
        yield FilterInput("search", id="log-search")
        yield LogView()

    def focus_first(self) -> None:
        self.query_one(LogView).focus()

    def take(self, model: RunModel) -> None:
        super().take(model)
        self.query_one(LogView).show(model.log_tail())

    def action_search(self) -> None:
        self.query_one(FilterInput).open()

    def action_find(self, direction: int) -> None:
        view = self.query_one(LogView)
        if not view.find(direction):
            self.notify("nothing found" if view.wanted else "press / to search", markup=False)

    def action_end(self) -> None:
        self.query_one(LogView).action_scroll_end()

    @on(Input.Changed, "#log-search")
    def _changed(self, event: Input.Changed) -> None:
        view = self.query_one(LogView)
        view.wanted = pattern(event.value) if event.value else None
        view.refresh()

    @on(Input.Submitted, "#log-search")
    def _searched(self) -> None:
        self.focus_first()
        self.action_find(-1)


def _pieces(text: str, width: int) -> list[str]:
    return [text[i : i + width] for i in range(0, max(len(text), 1), width)]
