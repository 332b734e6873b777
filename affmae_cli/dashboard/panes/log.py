"""Log: the end of the run's log.txt, followed while one looks at its end."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import RichLog

from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.title import retitle
from affmae_cli.output import printable

LINES = 500
"""Lines that are kept; the whole log is in the file."""


class LogPane(Pane):
    """Lines as they are; what is new is added below."""

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._lines: list[str] = []

    def compose(self) -> ComposeResult:
        """One scrolling text."""
        log = RichLog(id="log-text", max_lines=LINES, markup=False, highlight=False, wrap=True, min_width=20)
        retitle(log, "log.txt")
        yield log

    def show(self, view: RunView) -> None:
        """The log comes by itself, see `take`."""

    def take(self, lines: list[str]) -> None:
        """Show the last lines of the log."""
        log = self.query_one(RichLog)
        new = new_lines(self._lines, lines)
        if new is None:
            log.clear()
            new = lines
        at_end = log.is_vertical_scroll_end
        for line in new:
            log.write(Text(printable(line), style=self._style(line)), scroll_end=at_end)
        self._lines = lines

    def _style(self, line: str) -> str:
        return "bold" if " ERROR " in line or " WARNING " in line or "warning:" in line else ""


def new_lines(before: list[str], now: list[str]) -> list[str] | None:
    """What `now` has at its end that `before` lacks; None when they do not overlap (another file)."""
    if not before:
        return None
    for start in range(len(before)):
        kept = before[start:]
        if kept == now[: len(kept)]:
            return now[len(kept) :]
    return None
