"""The screen of one run: a status line, the tabs, a footer. A thread reads; its messages are handed to the seen tab."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, TabbedContent, TabPane, Tabs
from textual.worker import get_current_worker

from affmae_cli.dashboard.control import request_checkpoint, request_stop
from affmae_cli.dashboard.messages import ReadingFailed, RunChosen, RunRead, TextRead
from affmae_cli.dashboard.panes.config import ConfigPane
from affmae_cli.dashboard.panes.curves import CurvesPane
from affmae_cli.dashboard.panes.log import LINES, LogPane
from affmae_cli.dashboard.panes.overview import OverviewPane
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.panes.pictures import PicturesPane
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.panes.system import SystemPane
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.requests import Asked, under_way
from affmae_cli.dashboard.screens.question import Answer, Question
from affmae_cli.dashboard.status import Status
from affmae_cli.dashboard.view import RunView, Viewer
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.status_line import StatusLine
from affmae_cli.dashboard.zoom import ChartSettings, Zoom
from affmae_cli.output import printable
from affmae_engine.errors import AffmaeError
from affmae_engine.run_dir import CHECKPOINT, STOP

SECONDS_BETWEEN_READS = 0.5
SECONDS_OF_READING, SECONDS_OF_REST = 0.3, 0.1
"""A long run is opened in turns: between them the interpreter is free to draw."""
TABS: dict[str, type[Pane]] = {
    "overview": OverviewPane,
    "curves": CurvesPane,
    "pictures": PicturesPane,
    "system": SystemPane,
    "log": LogPane,
    "config": ConfigPane,
    "runs": RunsPane,
}
"""Tabs by their names, in the order of the keys 1 to 7."""


class RunScreen(Screen[None]):
    """Follows the run at `root`.

    Args:
        root: of the run.
        exit_code: of its trainer when that is our child, by run; None while it works.
        tab: which one is seen first.
        pixels: what draws pictures as pixels; None for half blocks.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "app.leave", "Leave", id="run.leave", tooltip="Leave the dashboard"),
        Binding("c", "checkpoint", "Checkpoint", id="run.checkpoint", tooltip="Ask for a checkpoint now"),
        Binding("s", "stop", "Stop", id="run.stop", tooltip="Ask the trainer to save and end"),
        Binding("p", "pause", "Pause", id="run.pause", tooltip="Hold the view still; the run goes on"),
        Binding("r", "tab('runs')", "Runs", id="run.switch", tooltip="Switch to another run, compare runs"),
        Binding("y", "copy", "Copy path", id="run.copy", tooltip="Copy the run's path"),
        Binding("t", "app.theme", "Theme", id="run.theme", tooltip="Dark or light"),
        Binding("question_mark", "app.help", "Help", id="run.help", tooltip="All keys", key_display="?"),
        *(
            Binding(str(number), f"tab('{name}')", name.capitalize(), id=f"tab.{name}", show=False)
            for number, name in enumerate(TABS, 1)
        ),
        Binding("l", "log_axis", "Logarithmic axis", id="chart.log", show=False),
        Binding("m", "smoothing", "Smoothing", id="chart.smoothing", show=False),
        Binding("plus,equals_sign", "zoom(1)", "Zoom in", id="chart.closer", show=False, key_display="+"),
        Binding("minus", "zoom(-1)", "Zoom out", id="chart.wider", show=False, key_display="-"),
        Binding("0", "zoom(0)", "Whole run", id="chart.whole", show=False),
        Binding("left", "pan(-1, 0)", "Earlier", id="chart.earlier", show=False),
        Binding("right", "pan(1, 0)", "Later", id="chart.later", show=False),
        Binding("up", "pan(0, -1)", "Previous pictures", id="pictures.previous", show=False),
        Binding("down", "pan(0, 1)", "Next pictures", id="pictures.next", show=False),
        Binding("pageup", "page(-1)", "Previous classes", id="classes.previous", show=False),
        Binding("pagedown", "page(1)", "Next classes", id="classes.next", show=False),
        Binding("n", "turn", "Next curve", id="chart.next", show=False),
    ]
    AUTO_FOCUS = ""  # focus in a tab that is not seen would bring it up
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-middle"), (160, "-wide")]  # noqa: RUF012 (as Textual declares it)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall"), (50, "-high")]  # noqa: RUF012 (as Textual declares it)

    # Containers hand these on and draw nothing of themselves.
    view: reactive[RunView | None] = reactive(None, repaint=False)
    settings: reactive[ChartSettings] = reactive(ChartSettings(), repaint=False)
    paused: reactive[bool] = reactive(False, repaint=False)

    def __init__(
        self,
        root: Path,
        exit_code: Callable[[Path], int | None],
        tab: str = "overview",
        pixels: type[Widget] | None = None,
    ) -> None:
        super().__init__()
        self.root, self._exit_code, self._first_tab, self._pixels = root, exit_code, tab, pixels
        self._newest: RunView | None = None
        self._text: TextRead | None = None
        self._asked: list[Asked] = []
        self._asking = False
        self._failures: set[str] = set()
        self._wake = threading.Event()

    def compose(self) -> ComposeResult:
        """Status, tabs, footer."""
        yield StatusLine(id="status")
        with TabbedContent(initial=self._first_tab):
            for number, (name, pane) in enumerate(TABS.items(), 1):
                with TabPane(f"{number} {name.capitalize()}", id=name):
                    yield pane(id=f"pane-{name}")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one(Tabs).can_focus = False  # its arrow keys would take ours
        self.query_one(PicturesPane).wall.pixels = self._pixels
        self._follow(self.root)

    def on_unmount(self) -> None:
        """Let the threads end at once."""
        self.workers.cancel_all()
        self._wake.set()

    @property
    def read_whole(self) -> bool:
        """Whether all that the run holds so far is drawn."""
        return self.view is not None and not self.view.opening and self.view is self.pane.view

    @property
    def newest(self) -> RunView | None:
        """What was read last of the run, also while an older view is held still."""
        return self._newest

    @property
    def tab(self) -> str:
        """The name of the tab that is seen."""
        return self.query_one(TabbedContent).active

    @property
    def pane(self) -> Pane:
        """What the seen tab holds."""
        return self.query_one(f"#pane-{self.tab}", Pane)

    @work(thread=True, exclusive=True, group="reader", exit_on_error=False)
    def _follow(self, root: Path) -> None:
        worker = get_current_worker()
        reader = RunReader(root, exit_code=lambda: self._exit_code(root))
        viewer, shown = Viewer(reader), None
        while not worker.is_cancelled:
            try:
                reader.poll(SECONDS_OF_READING)
                zoom = self.settings.zoom
                window = None if zoom.whole else zoom.window(0.0, float(reader.state.step))
                self.post_message(RunRead(viewer.view(window, time.time())))
                text = (reader.log_tail(LINES), reader.config_text(), reader.environment(), reader.problem)
                if text != shown:
                    self.post_message(TextRead(root, *text))
                shown = text
            except Exception as error:  # whatever a run holds must not end the view of it
                self.post_message(ReadingFailed(error))
            self._wake.wait(SECONDS_OF_REST if reader.behind else SECONDS_BETWEEN_READS)
            self._wake.clear()

    def on_run_read(self, message: RunRead) -> None:
        """The newest moment; drawn unless the view is paused."""
        if message.view.root == self.root:
            first, self._newest = self._newest is None, message.view
            if not self.paused:
                self.view = message.view
            if first:
                self.refresh_bindings()

    async def on_text_read(self, message: TextRead) -> None:
        """The newest log and configuration; drawn unless the view is paused."""
        if message.root == self.root:
            self._text = message
            if not self.paused:
                await self._draw_text(message)

    async def _draw_text(self, text: TextRead) -> None:
        self.query_one(LogPane).take(text.log)
        self.query_one(OverviewPane).take(text.log)
        await self.query_one(ConfigPane).take(text.config, text.environment, text.problem)

    def on_reading_failed(self, message: ReadingFailed) -> None:
        """Say it, once for each kind."""
        text = f"{type(message.error).__name__}: {message.error}"
        if text not in self._failures:
            self._failures.add(text)
            self.notify(f"cannot read the run: {text}", severity="error", markup=False)

    def watch_view(self, before: RunView | None, view: RunView | None) -> None:
        """Draw a moment: the status, and the tab that is seen."""
        if view is None:
            return
        status = self.query_one(StatusLine)
        status.view = view
        self._asked, status.asked = under_way(self._asked, view)
        if view.drawable:
            self.pane.view = view
        if before is None or before.status.ended != view.status.ended:
            self.refresh_bindings()

    @on(TabbedContent.TabActivated)
    def _seen(self) -> None:
        pane = self.pane
        pane.settings, pane.view = self.settings, self.view
        runs = self.query_one(RunsPane)
        if pane is runs:
            runs.follow(self.root.parent)
        else:
            runs.leave()
        focused = next(
            (widget for widget in pane.query("DataTable, RichLog, VerticalScroll") if widget.focusable), None
        )
        self.set_focus(focused)

    @on(RunChosen)
    async def _switch(self, message: RunChosen) -> None:
        """Nothing of the run before may be taken for this one's."""
        self.root, self._asked, self._newest, self._text = message.root, [], None, None
        self.paused = False
        self.settings = replace(self.settings, zoom=Zoom())
        self._follow(message.root)
        self._wake.set()
        self.view = blank = RunView(message.root, Status("waiting", "reading the run"), time.time(), opening=True)
        for pane in self.query(Pane):
            pane.view = blank
        self.refresh_bindings()
        self.action_tab("overview")
        await self._draw_text(TextRead(message.root, [], "", {}, ""))

    async def watch_paused(self, paused: bool) -> None:
        """Say so; go on with the newest moment."""
        self.query_one(StatusLine).paused = paused
        if not paused and self._newest is not None:
            self.view = self._newest
        if not paused and self._text is not None:
            await self._draw_text(self._text)

    def watch_settings(self, settings: ChartSettings) -> None:
        """Draw charts otherwise; a zoomed window may need to be read."""
        if self.is_mounted:
            self.pane.settings = settings
            self._wake.set()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Requests make sense only while a trainer may be there."""
        if action in ("checkpoint", "stop") and (self._newest is None or self._newest.status.ended):
            return None
        return True

    def action_tab(self, name: str) -> None:
        """See a tab."""
        self.query_one(TabbedContent).active = name

    def action_pause(self) -> None:
        """Hold the view still, or go on."""
        self.paused = not self.paused

    def action_copy(self) -> None:
        """Copy the run's path to the clipboard of the terminal."""
        path = str(self.root.absolute())
        self.app.copy_to_clipboard(path)
        self.notify(f"copied: {printable(path)}", markup=False)

    def action_checkpoint(self) -> None:
        """Ask for a checkpoint."""
        self._request(CHECKPOINT, request_checkpoint)

    @work
    async def action_stop(self) -> None:
        """Ask whether to stop, then ask the trainer to."""
        answers = [Answer("stop", "s", "Stop after a checkpoint", "the trainer saves and ends; it can be resumed")]
        question = Question(f"Stop {printable(self.root.name)}?", answers)
        if await self.ask(question) == "stop":
            self._request(STOP, request_stop)

    async def ask(self, question: Question) -> str | None:
        """The answer; None when it was cancelled, or when another question is about to appear, to which the key that
        brought us here was meant as an answer. Call it in a worker."""
        if self._asking:
            return None
        self._asking = True
        try:
            return await self.app.push_screen_wait(question)
        finally:
            self._asking = False

    def action_log_axis(self) -> None:
        """Logarithmic or linear height."""
        self.settings = replace(self.settings, log=not self.settings.log)

    def action_smoothing(self) -> None:
        """Moving means over the data, or the data alone."""
        self.settings = replace(self.settings, smoothing=not self.settings.smoothing)

    def action_zoom(self, direction: int, at: float | None = None) -> None:
        """In (1), out (-1), all (0)."""
        if not self.pane.zoom(direction, at):
            last = float(self.view.step if self.view else 0)
            self.settings = replace(self.settings, zoom=self.settings.zoom.turned(direction, 0.0, last, at))

    def action_pan(self, across: int, down: int) -> None:
        """Through the steps of a zoomed chart, or through pictures."""
        if not self.pane.pan(across, down) and across:
            reach = (0.0, float(self.view.step if self.view else 0))
            self.settings = replace(self.settings, zoom=self.settings.zoom.panned(*reach, across / 4))

    def action_page(self, direction: int) -> None:
        """Through the table of classes."""
        self.pane.page(direction)

    def action_turn(self) -> None:
        """The next curve."""
        self.pane.turn()

    @on(Chart.Wheel)
    def _wheel(self, message: Chart.Wheel) -> None:
        self.action_zoom(message.direction, message.at)

    def _request(self, name: str, send: Callable[[Path], None]) -> None:
        try:
            send(self.root)
        except AffmaeError as error:
            self.notify(error.message, severity="error", markup=False)
            return
        newest = self._newest.recent[-1] if self._newest and self._newest.recent else None
        self._asked = [*(asked for asked in self._asked if asked.name != name), Asked(name, newest)]
        self._wake.set()
