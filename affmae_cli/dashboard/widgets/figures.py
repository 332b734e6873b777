"""Labelled figures in aligned rows, some with a bar. Each part of a bar has a character of its own, for no colour."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.geometry import Size
from textual.reactive import reactive
from textual.widget import Widget

from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.widgets.title import retitle

Tone = Literal["plain", "strong", "good", "warn", "bad", "muted"]
_KINDS = ("label", "own", "others", "free", "plain", "strong", "good", "warn", "bad", "muted")
_FILL = {"own": "█", "others": "▒"}
_FREE, _PEAK = "·", "▕"
_LONGEST_BAR = 24


@dataclass(frozen=True)
class Bar:
    """Shares of a whole, 0 to 1: what is this run's own, what others use, and the most that was ever used."""

    own: float
    others: float = 0.0
    peak: float | None = None

    def draw(self, width: int) -> list[tuple[str, str]]:
        """Pieces of (text, kind) of `width` characters together."""
        own = min(round(self.own * width), width) or (1 if self.own > 0 else 0)
        others = min(round(self.others * width), width - own)
        free = list(_FREE * (width - own - others))
        at = None if self.peak is None else min(round(self.peak * width), width) - own - others - 1
        if at is not None and 0 <= at < len(free):
            free[at] = _PEAK
        return [(_FILL["own"] * own, "own"), (_FILL["others"] * others, "others"), ("".join(free), "free")]


@dataclass(frozen=True)
class Figure:
    """One row. A label of "" continues the row above."""

    label: str
    text: str
    tone: Tone = "plain"
    bar: Bar | None = None


class Figures(Widget):
    """Draws `rows`; text that is too long goes on in the next line. Whatever a text holds, a row stays a row."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"figures--{kind}" for kind in _KINDS}

    rows: reactive[tuple[Figure, ...]] = reactive(())

    def __init__(self, title: str = "", **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        retitle(self, title)
        self._height = 0

    def watch_rows(self, before: tuple[Figure, ...], after: tuple[Figure, ...]) -> None:
        """Lay the screen out anew only when the box grows or shrinks."""
        if len(before) != len(after) or self._height != len(self._lines(self.size.width)):
            self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as the rows need at `width`."""
        self._height = len(self._lines(width))
        return self._height

    def render(self) -> Text:
        """All rows as one text."""
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        for number, line in enumerate(self._lines(self.size.width)):
            text.append("\n" if number else "")
            for piece, kind in line:
                text.append(piece, self.get_component_rich_style(f"figures--{kind}"))
        return text

    def _lines(self, width: int) -> list[list[tuple[str, str]]]:
        labels = [one_line(row.label) for row in self.rows]
        indent = max(map(cell_len, labels), default=0) + 2
        lines: list[list[tuple[str, str]]] = []
        for label, row in zip(labels, self.rows, strict=True):
            pieces, used = [(set_cell_size(label, indent), "label")], indent
            if row.bar is not None:
                length = max(4, min(_LONGEST_BAR, width - indent - len(row.text) - 1))
                pieces += [*row.bar.draw(length), (" ", "plain")]
                used += length + 1
            first, *more = textwrap.wrap(one_line(row.text), max(8, width - used)) or [""]
            lines.append([*pieces, (first, row.tone)])
            lines += [[(" " * used, "label"), (line, row.tone)] for line in more]
        return lines
