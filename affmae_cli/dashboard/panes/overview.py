"""Overview: the loss, the newest picture, the figures that matter, and what happened last."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from affmae_cli.dashboard import present
from affmae_cli.dashboard.gather import traces
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.event_list import EventList
from affmae_cli.dashboard.widgets.figures import Figures
from affmae_cli.dashboard.widgets.preview_wall import Picture, PreviewWall
from affmae_cli.dashboard.widgets.title import retitle
from affmae_cli.output import printable

LOG_LINES = 5
_FEWEST_CLASSES = 4
TILE_EDGE = 30  # pixels; below, a tile shows nothing


class OverviewPane(Pane):
    """The tab that is open most of the time."""

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._drawn: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """Chart and picture, three columns of figures, events."""
        with Horizontal(id="overview-top"):
            yield Chart("loss", id="overview-loss", empty="waiting for the first step")
            yield PreviewWall(edge=TILE_EDGE, id="overview-picture")
        with Horizontal(id="overview-figures"):
            yield Figures("training", id="overview-training")
            yield Figures("losses", id="overview-losses")
            yield Figures("machine", id="overview-machine")
        yield Figures(id="overview-verdict")
        yield Static(id="overview-log", markup=False)
        yield EventList(id="overview-events")

    def on_mount(self) -> None:
        """Name the end of the log, which is seen when the run broke."""
        retitle(self.query_one("#overview-log"), "end of log.txt")

    def take(self, log: list[str]) -> None:
        """The last lines of the log."""
        self.query_one("#overview-log", Static).update(printable("\n".join(log[-LOG_LINES:])))

    def show(self, view: RunView) -> None:
        """Draw the view."""
        if self._drawn != (view.root, view.revision):
            self._drawn = (view.root, view.revision)
            chart = self.query_one("#overview-loss", Chart)
            chart.traces, chart.last = traces(view, "loss"), float(view.step)
        self.query_one("#overview-training", Figures).rows = present.training(view)
        self.set_class(view.status.kind in ("failed", "gone"), "-broken")
        self.query_one("#overview-verdict", Figures).rows = present.verdicts(view, 1)
        most = max(_FEWEST_CLASSES, self.size.height // 4)
        scores = present.classes(view, most) if view.task == "finetune" else ()
        middle = self.query_one("#overview-losses", Figures)
        middle.rows = scores or present.losses(view)
        left_out = view.evaluated is not None and len(view.evaluated.per_class) > most
        retitle(middle, "losses" if not scores else "the worst classes" if left_out else "classes")
        self.query_one("#overview-machine", Figures).rows = present.machine(view)
        wall, newest = self.query_one(PreviewWall), view.previews[-1] if view.previews else None
        wall.picture = Picture(view.root / newest.path, newest.time) if newest is not None else None
        retitle(wall, f"preview of step {newest.step:,}" if newest is not None else "preview")
        self.query_one(EventList).events = view.recent[-40:]
