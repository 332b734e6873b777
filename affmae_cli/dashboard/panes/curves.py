"""Curves: one large chart, the others below where there is room; n puts the next one on top."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Grid
from textual.reactive import reactive

from affmae_cli.dashboard.gather import SPECS, title, traces
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.chart import Chart


class CurvesPane(Pane):
    """Everything that is drawn over the steps."""

    main: reactive[int] = reactive(0)

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._drawn: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """All charts; the stylesheet decides which are seen."""
        with Grid(id="curves-grid"):
            for spec in SPECS:
                yield Chart(
                    spec.title,
                    empty=spec.empty,
                    floor=spec.floor,
                    may_log=spec.may_log,
                    may_smooth=spec.may_smooth,
                    id=f"curves-{spec.key}",
                )

    def on_mount(self) -> None:
        """Show the loss large."""
        self._chart(0).add_class("-main")

    def show(self, view: RunView) -> None:
        """Draw the charts when their curves changed."""
        if self._drawn != (view.root, view.revision):
            self._drawn = (view.root, view.revision)
            for spec in SPECS:
                chart = self.query_one(f"#curves-{spec.key}", Chart)
                chart.title = title(view, spec)
                chart.traces, chart.last = traces(view, spec.key), float(view.step)

    def turn(self) -> None:
        """The next chart large."""
        self.main = (self.main + 1) % len(SPECS)

    def watch_main(self, before: int, after: int) -> None:
        """Put the chart on top."""
        if self.is_mounted:
            self._chart(before).remove_class("-main")
            self._chart(after).add_class("-main")
            self.query_one(Grid).move_child(self._chart(after), before=0)

    def _chart(self, number: int) -> Chart:
        return self.query_one(f"#curves-{SPECS[number].key}", Chart)
