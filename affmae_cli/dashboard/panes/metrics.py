"""Metrics: a grid of every chart of the run, with a filter."""

from __future__ import annotations

import re
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, VerticalScroll
from textual.widgets import Input

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.charts import run_charts
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.run_model import RunModel

_LOWEST, _WIDEST = 9, 72
"""Rows that a chart has at least, and columns from which on another one fits beside it."""


class FilterInput(Input):
    """A line for a regular expression; Escape clears and closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close filter")]

    def __init__(self, what: str, *, id: str) -> None:
        super().__init__(placeholder=f"{what}: a regular expression", id=id, classes="filter", compact=True)
        self.display = False

    def open(self) -> None:
        """Show it and write in it."""
        self.display = True
        self.focus()

    def action_close(self) -> None:
        """All again."""
        self.value, self.display = "", False
        for ancestor in self.ancestors:
            if isinstance(ancestor, Pane):
                ancestor.focus_first()
                return


def pattern(text: str) -> re.Pattern[str]:
    """A filter as a pattern; text that is no regular expression is searched for as it is."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error:
        return re.compile(re.escape(text), re.IGNORECASE)


class MetricsPane(Pane):
    """Charts over the steps, as many beside each other as the width allows."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("slash", "filter", "Filter", key_display="/")]

    def compose(self) -> ComposeResult:
        """The filter, the charts."""
        yield FilterInput("charts", id="metrics-filter")
        with VerticalScroll(can_focus=False):
            yield Grid(id="metrics-grid")

    def focus_first(self) -> None:
        """The first chart."""
        charts = self.query(Chart)
        (charts.first() if charts else self).focus()

    def take(self, model: RunModel) -> None:
        """Draw the charts; new ones are added where the run has them."""
        super().take(model)
        wanted = pattern(self.query_one(FilterInput).value)
        specs = {spec.key: spec for spec in run_charts(model) if wanted.search(f"{spec.title} {spec.key}")}
        grid = self.query_one("#metrics-grid", Grid)
        present = {chart.spec.key: chart for chart in grid.query(Chart)}
        if list(present) != list(specs):
            grid.remove_children([chart for key, chart in present.items() if key not in specs])
            grid.mount_all(Chart(spec) for key, spec in specs.items() if key not in present)
            order = {key: number for number, key in enumerate(specs)}
            grid.sort_children(key=lambda chart: order.get(chart.spec.key, 0) if isinstance(chart, Chart) else 0)
            self.call_after_refresh(self._draw)
        self._arrange(len(specs))
        self._draw()

    def _draw(self) -> None:
        if self.model is not None:
            for chart in self.query(Chart):
                chart.take(self.model)

    def _arrange(self, count: int) -> None:
        width, height = self.size
        columns = max(1, min(3, width // _WIDEST + (width >= 100), count))
        rows = -(-count // columns)
        each = max(_LOWEST, height // rows) if rows else _LOWEST
        grid = self.query_one("#metrics-grid", Grid)
        grid.styles.grid_size_columns, grid.styles.grid_rows = columns, str(each)
        grid.styles.height = each * rows

    def action_filter(self) -> None:
        """Choose charts."""
        self.query_one(FilterInput).open()

    @on(Input.Changed, "#metrics-filter")
    def _filtered(self) -> None:
        if self.model is not None:
            self.take(self.model)

    @on(Input.Submitted, "#metrics-filter")
    def _done(self) -> None:
        self.focus_first()
