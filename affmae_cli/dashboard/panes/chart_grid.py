"""Charts beside and below each other, as many in a row as the width allows; they scroll where they do not all fit."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Grid, VerticalScroll

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.charts import ChartSpec
from affmae_cli.dashboard.run_model import RunModel

_LOWEST = 9
"""Rows that a chart has at least."""
_COLUMNS = ((150, 3), (90, 2), (0, 1))
"""Columns of charts by the width from which on they are used."""


class ChartGrid(VerticalScroll, can_focus=False):
    """Draws charts of a run; those that it no longer has are removed, new ones are added."""

    def compose(self) -> ComposeResult:
        yield Grid(classes="charts")

    def focus_first(self) -> bool:
        """Focus the first chart; False if there is none."""
        charts = self.query(Chart)
        if charts:
            charts.first().focus()
        return bool(charts)

    def take(self, model: RunModel, specs: Sequence[ChartSpec]) -> None:
        grid = self.query_one(".charts", Grid)
        present = {chart.spec.key: chart for chart in grid.query(Chart)}
        wanted = {spec.key: spec for spec in specs}
        if list(present) != list(wanted):
            grid.remove_children([chart for key, chart in present.items() if key not in wanted])
            grid.mount_all(Chart(spec) for key, spec in wanted.items() if key not in present)
            order = {key: number for number, key in enumerate(wanted)}
            grid.sort_children(key=lambda chart: order.get(chart.spec.key, 0) if isinstance(chart, Chart) else 0)
            if self.screen.focused is self.parent:  # it waited for a chart
                self.call_after_refresh(self.focus_first)
        # Rows share the height if they get enough of it, else the grid is higher than the screen.
        columns = max(1, min(next(n for width, n in _COLUMNS if self.size.width >= width), len(specs)))
        rows = -(-len(specs) // columns)
        each = max(_LOWEST, self.size.height // rows) if rows else _LOWEST
        grid.styles.grid_size_columns, grid.styles.grid_rows = columns, str(each)
        grid.styles.height = each * rows
        for chart in grid.query(Chart):
            chart.take(model)
