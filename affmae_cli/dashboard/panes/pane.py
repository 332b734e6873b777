"""What every tab has in common: it draws views of the run while it is seen, and obeys the keys that concern it."""

from __future__ import annotations

from textual.containers import Container
from textual.reactive import reactive

from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.chart import Chart


class Pane(Container):
    """Base of the tabs' contents. `view` is set only while the tab is seen; subclasses draw it in `show`."""

    view: reactive[RunView | None] = reactive(None)

    def watch_view(self, view: RunView | None) -> None:
        """Draw a new moment."""
        if view is not None:
            self.show(view)

    def show(self, view: RunView) -> None:
        """Hand parts of the view to the widgets."""
        raise NotImplementedError

    def charts(self) -> list[Chart]:
        """Charts that the chart keys act on; none: the keys do nothing here."""
        return list(self.query(Chart))
