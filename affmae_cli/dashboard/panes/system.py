"""System: what the machine does for this run, as figures and over the last hours, and what to do about it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Grid, Horizontal

from affmae_cli.dashboard import present
from affmae_cli.dashboard.gather import SYSTEM_SPECS, system_traces
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.figures import Figures
from affmae_cli.dashboard.zoom import ChartSettings


class SystemPane(Pane):
    """Card, memory, machine, verdicts."""

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._drawn: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """Verdicts on top, figures, charts where there is room."""
        yield Figures("what it means", id="system-verdicts")
        with Horizontal(id="system-figures"):
            yield Figures("card", id="system-card")
            yield Figures("memory and machine", id="system-memory")
            yield Figures("run", id="system-about")
        with Grid(id="system-charts"):
            for spec in SYSTEM_SPECS:
                yield Chart(
                    spec.title,
                    empty=spec.empty,
                    floor=0.0,
                    may_log=False,
                    unit="minute",
                    id=f"system-chart-{spec.key}",
                )

    def watch_settings(self, settings: ChartSettings) -> None:
        """These charts are over time: zoom and log axis, which are about steps, leave them alone."""
        super().watch_settings(ChartSettings(smoothing=settings.smoothing))

    def zoom(self, direction: int, at: float | None = None) -> bool:
        """What is not seen here is not zoomed from here."""
        return True

    def pan(self, across: int, down: int) -> bool:
        """Nor moved."""
        return True

    def show(self, view: RunView) -> None:
        """Draw the view."""
        self.set_class(view.on_cpu, "-no-card")
        self.query_one("#system-verdicts", Figures).rows = present.verdicts(view)
        self.query_one("#system-card", Figures).rows = present.card(view)
        self.query_one("#system-memory", Figures).rows = (*present.memory(view), *present.host(view))
        self.query_one("#system-about", Figures).rows = (*present.about(view), *present.ranks(view))
        if self._drawn != (view.root, view.revision):
            self._drawn = (view.root, view.revision)
            for spec in SYSTEM_SPECS:
                found = system_traces(view, spec.key)
                chart = self.query_one(f"#system-chart-{spec.key}", Chart)
                chart.traces, chart.last = found, max((float(t.x[-1]) for t in found if len(t.x)), default=0.0)
