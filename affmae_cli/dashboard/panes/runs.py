"""Runs: all runs of the folder in a sortable table; those that are marked are compared in one chart."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.reactive import reactive
from textual.widgets import DataTable, Static
from textual.worker import get_current_worker

from affmae_cli.dashboard.gather import COMPARISONS, comparison_traces
from affmae_cli.dashboard.messages import RunChosen, RunsRead
from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.run_table import COLUMNS, fitted, ordered
from affmae_cli.dashboard.runs import RunRow, RunsFolder
from affmae_cli.dashboard.view import Compared, RunView, Viewer
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.title import retitle
from affmae_cli.dashboard.zoom import ChartSettings, Zoom

SECONDS_BETWEEN_LOOKS = 1.0
_NEWEST_FIRST = len(COLUMNS) - 1
_MARK, _GAP = 1, 2
"""Cells of the column of marks, and between two columns."""


class RunsPane(Pane):
    """order: the column that sorts; marked: runs that are compared; shown: which curve of theirs; part: of the longest
    of them that is seen, since the run that is followed may be a hundred times shorter."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "Compare", id="runs.compare", show=False),
        Binding("o", "order", "Order", id="runs.order", show=False),
    ]

    order: reactive[int] = reactive(_NEWEST_FIRST, init=False)
    reverse: reactive[bool] = reactive(False, init=False)
    marked: reactive[tuple[Path, ...]] = reactive((), init=False)
    shown: reactive[int] = reactive(0, init=False)
    part: reactive[Zoom] = reactive(Zoom(), init=False)

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.rows: list[RunRow] = []
        self._compared: list[Compared] = []
        self._listed: list[Path] = []
        self._drawn: tuple[list[list[Text]], list[int]] = [], []
        self._wake = threading.Event()

    def compose(self) -> ComposeResult:
        """Table above, chart below."""
        yield Static(id="runs-problem", markup=False)
        yield DataTable(id="runs-table", cursor_type="row", zebra_stripes=True, cell_padding=_GAP // 2)
        yield Chart("loss", empty="mark runs with the space bar to compare them here", id="runs-chart")

    def on_resize(self) -> None:
        """Columns are as wide as there is room for."""
        self._draw_table()

    def show(self, view: RunView) -> None:
        """The run that is followed is written bold."""
        self._draw_table()

    @work(thread=True, exclusive=True, group="runs", exit_on_error=False)
    def follow(self, folder: Path) -> None:
        """Look at the folder again and again, until the worker is cancelled."""
        worker, runs = get_current_worker(), RunsFolder(folder)
        viewers: dict[Path, tuple[RunReader, Viewer]] = {}
        rows: list[RunRow] = []
        while not worker.is_cancelled:
            problem, behind, compared = "", False, []
            try:
                rows = runs.rows()
            except Exception as error:  # whatever a run holds must not end the view of the others
                problem = f"cannot look at the runs: {type(error).__name__}: {error}"
            for root in self.marked:
                if root not in viewers:
                    reader = RunReader(root)
                    viewers[root] = reader, Viewer(reader)
                reader, viewer = viewers[root]
                try:
                    behind |= reader.poll() and reader.behind
                    compared.append(viewer.compared())
                except Exception as error:
                    problem = f"cannot read {root.name}: {type(error).__name__}: {error}"
            self.post_message(RunsRead(rows, compared, problem))
            self._wake.wait(0.0 if behind else SECONDS_BETWEEN_LOOKS)
            self._wake.clear()

    def leave(self) -> None:
        """Stop looking."""
        self.workers.cancel_group(self, "runs")
        self._wake.set()

    def on_runs_read(self, message: RunsRead) -> None:
        """Draw what was found."""
        self.rows, self._compared = message.rows, message.compared
        said = self.query_one("#runs-problem", Static)
        said.update(one_line(message.problem))
        said.display = bool(message.problem)
        self._draw_table()
        self._draw_chart()

    def watch_settings(self, settings: ChartSettings) -> None:
        """Draw the chart otherwise, but of the part that was chosen here."""
        super().watch_settings(replace(settings, zoom=self.part))

    def watch_part(self) -> None:
        """Another part."""
        self.watch_settings(self.settings)

    def zoom(self, direction: int, at: float | None = None) -> bool:
        """Of the longest run that is compared."""
        self.part = self.part.turned(direction, 0.0, self.query_one(Chart).last, at)
        return True

    def pan(self, across: int, down: int) -> bool:
        """Through the longest run that is compared."""
        self.part = self.part.panned(0.0, self.query_one(Chart).last, across / 4)
        return True

    def turn(self) -> None:
        """Compare another curve."""
        self.shown = (self.shown + 1) % len(COMPARISONS)

    def action_mark(self) -> None:
        """Add the run under the cursor to the comparison, or take it out."""
        root = self._under_cursor()
        if root is not None:
            self.marked = tuple(r for r in self.marked if r != root) if root in self.marked else (*self.marked, root)
            self._wake.set()

    def action_order(self) -> None:
        """Order by the next column."""
        self.order, self.reverse = (self.order + 1) % len(COLUMNS), False

    @on(DataTable.HeaderSelected)
    def _order_by(self, event: DataTable.HeaderSelected) -> None:
        if event.column_key.value not in (None, "mark"):
            chosen = int(event.column_key.value)
            self.order, self.reverse = chosen, self.order == chosen and not self.reverse

    @on(DataTable.RowSelected)
    def _open(self) -> None:
        root = self._under_cursor()
        if root is not None:
            self.post_message(RunChosen(root))

    def watch_order(self) -> None:
        """Order anew."""
        self._draw_table()

    watch_reverse = watch_marked = watch_order

    def watch_shown(self) -> None:
        """Another curve."""
        self._draw_chart()

    def _under_cursor(self) -> Path | None:
        at = self.query_one(DataTable).cursor_row
        return self._listed[at] if 0 <= at < len(self._listed) else None

    def _draw_table(self) -> None:
        table, followed = self.query_one(DataTable), self.view.root if self.view else None
        rows = ordered(self.rows, self.order, reverse=self.reverse)
        order = f"{COLUMNS[self.order].title}{', reversed' if self.reverse else ''}"
        count = f"{len(rows)} run{'s' if len(rows) != 1 else ''}"
        retitle(table, f"{count} by {order}   Enter opens, Space compares, o orders, n next curve")
        room = self.size.width - table.styles.scrollbar_size_vertical
        texts_of_rows, wide = fitted(rows, room - _MARK - _GAP, _GAP)
        lines = [
            _line(texts, marked=row.root in self.marked, bold=row.root == followed)
            for row, texts in zip(rows, texts_of_rows, strict=True)
        ]
        aimed_at, self._listed = self._under_cursor(), [row.root for row in rows]
        if (lines, wide) != self._drawn:
            self._fill(table, lines, wide)
        # The cursor stays on its run, wherever that went, and what is in sight stays there.
        row = self._listed.index(aimed_at) if aimed_at in self._listed else min(table.cursor_row, len(rows) - 1)
        if row != table.cursor_row:
            table.set_reactive(DataTable.cursor_coordinate, Coordinate(max(row, 0), 0))
            table.refresh()

    def _fill(self, table: DataTable[Text], lines: list[list[Text]], wide: list[int]) -> None:
        """Only the cells that changed, where the table keeps its shape."""
        before, widths = self._drawn
        self._drawn = lines, wide
        if wide == widths and len(lines) == len(before):
            for row, (old, new) in enumerate(zip(before, lines, strict=True)):
                for column, (cell, text) in enumerate(zip(old, new, strict=True)):
                    if cell != text or cell.style != text.style:
                        table.update_cell_at(Coordinate(row, column), text)
            return
        seen, cursor = table.scroll_offset, table.cursor_coordinate
        table.set_reactive(DataTable.cursor_coordinate, Coordinate(0, 0))  # or clearing would scroll to it later
        self._draw_head(table, wide)
        for line in lines:
            table.add_row(*line)
        table.set_reactive(DataTable.cursor_coordinate, cursor)
        table.scroll_to(seen.x, seen.y, animate=False, immediate=True)

    def _draw_head(self, table: DataTable[Text], wide: list[int]) -> None:
        # Widths are given: those that a table finds out by itself come too late for the first picture of a row, which
        # it then keeps.
        table.clear(columns=True)
        table.add_column(Text(""), key="mark", width=_MARK)
        for number, (column, width) in enumerate(zip(COLUMNS, wide, strict=True)):
            title = Text(column.title, justify="right" if column.right else "left")
            table.add_column(title, key=str(number), width=width)

    def _draw_chart(self) -> None:
        chart, comparison = self.query_one(Chart), COMPARISONS[self.shown]
        chart.title = comparison.title
        chart.traces = comparison_traces(self._compared, comparison)
        chart.last = max((run.last for run in self._compared), default=0.0)


def _line(texts: Sequence[str], *, marked: bool, bold: bool) -> list[Text]:
    """The cells of a row."""
    style = "bold" if bold else ""
    cells = [
        Text(text, style, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
        for text, column in zip(texts, COLUMNS, strict=True)
    ]
    return [Text("◆" if marked else "·"), *cells]
