"""Metrics: a grid of every chart of the run, with a filter."""

from __future__ import annotations

import re
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input

from affmae_cli.dashboard.charts import run_charts
from affmae_cli.dashboard.panes.chart_grid import ChartGrid
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.run_model import RunModel


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
        yield FilterInput("charts", id="metrics-filter")
        yield ChartGrid()

    def focus_first(self) -> None:
        if not self.query_one(ChartGrid).focus_first():
            self.focus()

    def take(self, model: RunModel) -> None:
        super().take(model)
        wanted = pattern(self.query_one(FilterInput).value)
        specs = [spec for spec in run_charts(model) if wanted.search(f"{spec.title} {spec.key}")]
        self.query_one(ChartGrid).take(model, specs)

    def action_filter(self) -> None:
        self.query_one(FilterInput).open()

    @on(Input.Changed, "#metrics-filter")
    def _filtered(self) -> None:
        if self.model is not None:
            self.take(self.model)

    @on(Input.Submitted, "#metrics-filter")
    def _done(self) -> None:
        self.focus_first()
