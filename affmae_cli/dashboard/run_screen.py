"""The screen of one run: a status line, the tabs, a footer. A thread reads the run; the tab that is seen draws it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, TabbedContent, TabPane, Tabs
from textual.worker import get_current_worker

from affmae_cli.dashboard.alerts import Alerts
from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.control import request
from affmae_cli.dashboard.dialogs import Answer, FullScreen, Question, enlarged
from affmae_cli.dashboard.panes.config import ConfigPane
from affmae_cli.dashboard.panes.log import LogPane
from affmae_cli.dashboard.panes.metrics import MetricsPane
from affmae_cli.dashboard.panes.overview import OverviewPane, progress_line
from affmae_cli.dashboard.panes.pane import Lines, Pane
from affmae_cli.dashboard.panes.pictures import PicturesPane
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.panes.system import SystemPane
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import SIGNS, cut, one_line
from affmae_cli.output import printable
from affmae_engine.errors import AffmaeError
from affmae_engine.run_dir import CHECKPOINT, STOP

SECONDS_BETWEEN_READS, SECONDS_BETWEEN_DRAWINGS, SECONDS_WITHOUT_NEWS = 0.5, 1.0, 2.0
SECONDS_OF_READING, SECONDS_OF_REST = 0.3, 0.1
"""A long run is opened in turns: between them the interpreter is free to draw."""
TABS: dict[str, type[Pane]] = {
    "overview": OverviewPane,
    "metrics": MetricsPane,
    "pictures": PicturesPane,
    "system": SystemPane,
    "log": LogPane,
    "config": ConfigPane,
    "runs": RunsPane,
}
"""Tabs by their names, in the order of the keys 1 to 7."""


class StatusBar(Lines):
    """State, task, name, progress; below, what is to be said of a run that does not simply run."""

    def take(self, model: RunModel, *, paused: bool) -> None:
        status, width = model.status, max(20, self.size.width)
        self.set_classes(f"state-{status.kind}")
        right = progress_line(model)
        left = Text(f"{SIGNS[status.kind]} {status.kind}", "bold", no_wrap=True, overflow="ellipsis", end="")
        left.append(f"  {one_line(model.task) or 'run'} ", "not bold").append(one_line(model.root.name))
        left.truncate(max(8, width - len(right) - 2), overflow="ellipsis", pad=True)
        lines = [left.append(f"  {right}", "not bold")]
        said = [*model.requests, *(["display paused, p resumes it"] if paused else [])]
        if status.kind not in ("running", "finished") or model.opening:
            said = [one_line(status.text), *([one_line(status.hint)] if status.hint else []), *said]
        elif status.text != "training" and status.kind == "running":
            said.append(status.text)
        lines += [Text(cut(text, width * 2), "not bold") for text in said]
        self.put(Text("\n").join(lines))


class RunScreen(Screen[None]):
    """Follows the run at `root`.

    Args:
        root: of the run.
        exit_code: of its trainer when that is our child, by run; None while it works.
        tab: which one is seen first.
        pixels: what draws pictures as pixels; None for half blocks.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "app.leave", "Quit", tooltip="Leave the dashboard; training goes on"),
        Binding("c", "checkpoint", "Checkpoint", tooltip="Ask the trainer for a checkpoint now"),
        Binding("s", "stop", "Stop", tooltip="Ask the trainer to save and end"),
        Binding("p", "pause", "Pause", tooltip="Pause the display; training goes on"),
        Binding("y", "copy", "Copy path", show=False, tooltip="Copy the run's path"),
        Binding("t", "app.theme", "Theme", show=False, tooltip="Dark or light"),
        Binding("r", "tab('runs')", "Runs", show=False, tooltip="All runs of the folder"),
        Binding("question_mark", "app.help", "Help", key_display="?", tooltip="All keys"),
        *(
            Binding(str(number), f"tab('{name}')", name.capitalize(), show=False, tooltip=f"Tab {name.capitalize()}")
            for number, name in enumerate(TABS, 1)
        ),
    ]
    AUTO_FOCUS = ""  # focus in a tab that is not seen would bring it up
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-middle"), (160, "-wide")]  # noqa: RUF012 (as Textual declares it)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall"), (50, "-high")]  # noqa: RUF012 (as Textual declares it)

    paused: reactive[bool] = reactive(False, init=False)

    @dataclass
    class Read(Message, bubble=False):
        """The run was read."""

        model: RunModel

        def can_replace(self, message: Message) -> bool:
            """The model is always the newest."""
            return isinstance(message, RunScreen.Read)

    @dataclass
    class Failed(Message, bubble=False):
        """Reading met an error that it did not expect; it goes on."""

        error: Exception

    @dataclass
    class Alert(Message):
        """Something happened that should be told where nobody looks at the screen."""

        text: str

    def __init__(
        self,
        root: Path,
        exit_code: Callable[[Path], int | None],
        tab: str = "overview",
        pixels: type[Widget] | None = None,
    ) -> None:
        super().__init__()
        self.root, self._exit_code, self._first_tab, self._pixels = root, exit_code, tab, pixels
        self.model = RunModel(root)
        self._alerts = Alerts()
        self._asking = False
        self._failures: set[str] = set()
        self._wake = threading.Event()
        self._seen: object = None

    def compose(self) -> ComposeResult:
        yield StatusBar(id="status")
        with TabbedContent(initial=self._first_tab):
            for number, (name, pane) in enumerate(TABS.items(), 1):
                with TabPane(f"{number} {name.capitalize()}", id=name):
                    yield pane(id=f"pane-{name}")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(Tabs).can_focus = False  # its arrow keys would take ours
        for grid in self.query(PictureGrid):
            grid.pixels = self._pixels
        self._follow(self.root)

    def on_unmount(self) -> None:
        self.workers.cancel_all()
        self._wake.set()

    @property
    def read_whole(self) -> bool:
        """Whether all that the run holds so far is drawn."""
        return not self.model.opening and self._seen is self.model and self.pane.model is self.model

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
        model = RunModel(root, exit_code=lambda: self._exit_code(root))
        new, told = True, 0.0
        while not worker.is_cancelled:
            try:
                new |= model.poll(SECONDS_OF_READING)
                # Times go on where nothing is new; more often than once a second nobody can see.
                if time.monotonic() - told >= (SECONDS_BETWEEN_DRAWINGS if new else SECONDS_WITHOUT_NEWS):
                    self.post_message(self.Read(model))
                    new, told = False, time.monotonic()
                for text in self._alerts.of(model):
                    self.post_message(self.Alert(text))
            except Exception as error:  # whatever a run holds must not end the view of it
                self.post_message(self.Failed(error))
            if self._wake.wait(SECONDS_OF_REST if model.opening else SECONDS_BETWEEN_READS):
                new, told = True, 0.0
            self._wake.clear()

    def on_run_screen_read(self, message: Read) -> None:
        if message.model.root != self.root:
            return
        ended = self.model.status.ended
        self.model = message.model
        if not self.paused:
            self._draw()
        if ended != self.model.status.ended:
            self.refresh_bindings()

    def on_run_screen_failed(self, message: Failed) -> None:
        text = f"{type(message.error).__name__}: {message.error}"
        if text not in self._failures:
            self._failures.add(text)
            self.notify(f"cannot read the run: {text}", severity="error", markup=False)

    def _draw(self) -> None:
        self._seen = self.model
        self.query_one(StatusBar).take(self.model, paused=self.paused)
        self.pane.take(self.model)
        if isinstance(self.app.screen, FullScreen):
            self.app.screen.take(self.model)

    def on_resize(self) -> None:
        self.call_after_refresh(lambda: self.query_one(StatusBar).take(self.model, paused=self.paused))

    @on(TabbedContent.TabActivated)
    def _tab_seen(self) -> None:
        pane, runs = self.pane, self.query_one(RunsPane)
        if pane is runs:
            runs.follow(self.root.parent)
        else:
            runs.leave()
        self.call_after_refresh(self._focus_pane)

    def _focus_pane(self) -> None:
        """Once the pane has its size and its charts."""
        self.pane.take(self.model)
        self.pane.focus_first()

    @on(RunsPane.Chosen)
    def _switch(self, message: RunsPane.Chosen) -> None:
        """Nothing of the run before may be taken for this one's."""
        self.root, self.model, self._alerts = message.root, RunModel(message.root), Alerts()
        self.paused = False
        self._follow(message.root)
        self._wake.set()
        self.action_tab("overview")
        self._draw()
        self.refresh_bindings()

    def watch_paused(self) -> None:
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Requests make sense only while a trainer may be there."""
        return action not in ("checkpoint", "stop") or not (self.model.opening or self.model.status.ended)

    def action_tab(self, name: str) -> None:
        self.set_focus(None)  # what is hidden while it has the focus would hand it on and bring its tab back
        self.query_one(TabbedContent).active = name

    def action_pause(self) -> None:
        self.paused = not self.paused

    def action_copy(self) -> None:
        path = self.model.place if ":" in self.model.place else str(self.root.absolute())
        self.app.copy_to_clipboard(path)
        self.notify(f"copied: {printable(path)}", markup=False)

    def action_enlarge(self) -> None:
        widget = self.focused if isinstance(self.focused, (Chart, PictureGrid)) else None
        found = widget or next((w for w in self.pane.query("Chart, PictureGrid") if w.display), None)
        screen = enlarged(found) if found is not None else None
        if screen is not None:
            self.app.push_screen(screen)

    def action_checkpoint(self) -> None:
        self._request(CHECKPOINT)

    @work
    async def action_stop(self) -> None:
        answers = [Answer("stop", "s", "Stop after a checkpoint", "the trainer saves and ends; it can be resumed")]
        if await self.ask(Question(f"Stop {printable(self.root.name)}?", answers)) == "stop":
            self._request(STOP)

    async def ask(self, question: Question) -> str | None:
        """The answer; None when it was canceled, or when another question is open already. Call it in a worker."""
        if self._asking:
            return None
        self._asking = True
        try:
            return await self.app.push_screen_wait(question)
        finally:
            self._asking = False

    def _request(self, name: str) -> None:
        try:
            request(self.root, name)
        except AffmaeError as error:
            self.notify(error.message, severity="error", markup=False)
            return
        self._wake.set()
