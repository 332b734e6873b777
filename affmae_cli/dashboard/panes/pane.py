"""What every tab has in common: it draws views of the run while it is seen, and obeys the keys that concern it."""

from __future__ import annotations

from textual.containers import Container
from textual.reactive import reactive

from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.zoom import ChartSettings


class Pane(Container):
    """Base of the tabs' contents. `view` is set while the tab is seen, and in every tab when another run is chosen;
    subclasses draw it in `show`."""

    # Containers hand these on and draw nothing of themselves.
    view: reactive[RunView | None] = reactive(None, repaint=False)
    settings: reactive[ChartSettings] = reactive(ChartSettings(), repaint=False)

    def watch_view(self, view: RunView | None) -> None:
        """Draw a new moment."""
        if view is not None:
            self.show(view)

    def watch_settings(self, settings: ChartSettings) -> None:
        """Draw charts otherwise."""
        for chart in self.query(Chart):
            chart.settings = settings

    def show(self, view: RunView) -> None:
        """Hand parts of the view to the widgets."""
        raise NotImplementedError

    def zoom(self, direction: int, at: float | None = None) -> bool:
        """In (1), out (-1), whole (0), around `at`; False: the steps of the run are what is zoomed."""
        return False

    def pan(self, across: int, down: int) -> bool:
        """By one step; False: the steps of the run are what is moved through."""
        return False

    def page(self, direction: int) -> None:
        """A page down (1) or up (-1) through what does not fit, where the tab has such a thing."""

    def turn(self) -> None:
        """The next of several things, where the tab shows one at a time."""
