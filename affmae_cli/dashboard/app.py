"""The dashboard's application: themes, the keys that every screen has, the view of all charts, and how it is left.

`run_dashboard` opens it on a terminal, `export_screen` saves one screen without a terminal. It reads run directories
and writes requests; the training does not depend on it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widget import Widget

from affmae_cli.dashboard import colors
from affmae_cli.dashboard.alerts import escape_sequences, run_command
from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.control import DashboardResult, Pictures, TrainerProcess, request
from affmae_cli.dashboard.dialogs import Answer, HelpScreen, Question
from affmae_cli.dashboard.export import save_screen
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.pixels import pixel_widget
from affmae_cli.dashboard.plot import ChartView
from affmae_cli.dashboard.run_screen import TABS, RunScreen
from affmae_cli.dashboard.terminal import gone, signals_handled
from affmae_cli.output import printable
from affmae_engine.errors import AffmaeError
from affmae_engine.run_dir import STOP

_TERMINAL_EVERY_S = 2.0
_HUNG_UP = 129
"""Exit code of a process that SIGHUP ended."""


class ThemedApp(App[Any]):
    """What all applications have in common: two themes."""

    CSS_PATH = "dashboard.tcss"

    def __init__(self) -> None:
        super().__init__()
        self.register_theme(colors.DARK)
        self.register_theme(colors.LIGHT)
        self.theme = colors.DARK.name

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The color of thin lines, for themes that lack it."""
        return {"rule": "#808080"}

    def action_theme(self) -> None:
        self.theme = (colors.LIGHT if self.current_theme.dark else colors.DARK).name


class DashboardApp(ThemedApp):
    """The application on one run.

    Args:
        root: run directory.
        child: the run's trainer, where the command that opened the dashboard started it.
        tab: which tab is seen first.
        pixels: what draws pictures as pixels, see `pixels.pixel_widget`; None for half blocks.
        notify: command that is started with each alert as its last argument; empty for none.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,ctrl+q", "leave", "Quit", show=False, priority=True),
    ]

    def __init__(
        self,
        root: Path,
        *,
        child: TrainerProcess | None = None,
        tab: str = "overview",
        pixels: type[Widget] | None = None,
        notify: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._root, self._child, self._first_tab, self._pixels, self._notify = root, child, tab, pixels, notify
        self._leaving: Question | None = None
        self.chart_views: dict[str, ChartView] = {}

    def on_mount(self) -> None:
        self.push_screen(RunScreen(self._root, self._exit_code, self._first_tab, self._pixels))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Actions of the palette (Ctrl-P)."""
        if isinstance(screen, RunScreen):
            for number, name in enumerate(TABS, 1):
                yield SystemCommand(
                    f"Tab {name.capitalize()}", f"key {number}", lambda name=name: screen.action_tab(name)
                )
            yield SystemCommand("Pause or resume the display", "training goes on; key p", screen.action_pause)
            yield SystemCommand("Copy the path of the run", "key y", screen.action_copy)
            if not screen.model.status.ended:
                yield SystemCommand("Save a checkpoint", "key c", screen.action_checkpoint)
                yield SystemCommand("Stop the trainer", "after a checkpoint; key s", screen.action_stop)
        yield SystemCommand("Dark or light theme", "key t", self.action_theme)
        yield SystemCommand("Help", "all keys; key ?", self.action_help)
        yield SystemCommand("Quit the dashboard", "training goes on; key q", self.action_leave)

    @on(Chart.ViewChanged)
    def _see(self, message: Chart.ViewChanged) -> None:
        """One view for all charts over the same x."""
        self.chart_views[message.x_name] = message.view
        for screen in self.screen_stack:
            for chart in screen.query(Chart):
                if chart.spec.x_name == message.x_name:
                    chart.view = message.view

    @on(RunScreen.Alert)
    def _alert(self, message: RunScreen.Alert) -> None:
        """Ring, notify the desktop, start the user's command."""
        self.bell()
        self.notify(message.text, timeout=30, markup=False)
        if self._driver is not None and not self.is_headless:
            self._driver.write(escape_sequences(message.text))
        problem = run_command(self._notify, message.text) if self._notify else ""
        if problem:
            self.notify(problem, severity="error", markup=False)

    def action_help(self) -> None:
        screen = next((s for s in reversed(self.screen_stack) if isinstance(s, RunScreen)), None)
        if screen is None or isinstance(self.screen, HelpScreen):
            return
        places: dict[str, Sequence[BindingType]] = {"Everywhere": RunScreen.BINDINGS, "Charts": Chart.BINDINGS}
        places |= {name.capitalize(): pane.BINDINGS for name, pane in TABS.items() if pane.BINDINGS}
        keys: dict[str, list[tuple[str, str]]] = {}
        for place, bindings in places.items():
            found = [
                b
                for b in bindings
                if isinstance(b, Binding) and (b.show or (place == "Everywhere" and not b.key.isdigit()))
            ]
            keys[place] = [(self.get_key_display(b), b.tooltip or b.description) for b in found]
        keys["Everywhere"] = [
            ("1 to 7", "Tabs"),
            *keys["Everywhere"],
            ("^p", "Command palette"),
            ("tab", "Next chart or picture"),
        ]
        self.push_screen(HelpScreen(keys))

    @work
    async def action_leave(self) -> None:
        """Leave; with a trainer of ours at work, ask what becomes of it. Asked for twice, training goes on."""
        if self._child is None:
            self.exit(DashboardResult("detach"))
        elif self._trainer_ended(self._child):
            self.exit(DashboardResult("ended"))
        elif self._leaving is None:
            await self._ask_how_to_leave(self._child)
        elif self.screen is self._leaving:
            self.exit(DashboardResult("detach"))

    async def _ask_how_to_leave(self, child: TrainerProcess) -> None:
        answers = [
            Answer("detach", "d", "Detach", "training goes on; affmae watch shows it again", "primary"),
            Answer("stop", "s", "Stop after a checkpoint", "the trainer saves and ends; it can be resumed", "warning"),
        ]
        self._leaving = Question(f"{printable(self._root.name)} is still training", answers)
        try:
            while not isinstance(screen := self.screen, RunScreen):  # Help, or a question about something else
                await screen.dismiss(None)
            answer = await screen.ask(self._leaving)
        finally:
            self._leaving = None
        if answer is not None and self._trainer_ended(child):
            self.exit(DashboardResult("ended"))
        elif answer == "detach":
            self.exit(DashboardResult("detach"))
        elif answer == "stop":
            self._stop()

    def leave_by_signal(self, _number: int) -> None:
        """The terminal or the session ends: restore it. Training goes on."""
        if gone():
            _end_at_once()
        self.exit(DashboardResult("detach"))

    def _stop(self) -> None:
        try:
            request(self._root, STOP)
        except AffmaeError as error:
            self.notify(error.message, severity="error", markup=False)
            return
        self.exit(DashboardResult("stop"))

    def _exit_code(self, root: Path) -> int | None:
        return self._child.poll() if self._child is not None and root == self._root else None

    def _trainer_ended(self, child: TrainerProcess) -> bool:
        """Of our own run, whichever run is shown and however old what is drawn."""
        if child.poll() is not None:
            return True
        models = (screen.model for screen in self.screen_stack if isinstance(screen, RunScreen))
        return any(model.root == self._root and model.status.ended for model in models)


async def _leave_with_terminal() -> None:
    """A terminal may go without a signal, as for a process that ignores SIGHUP."""
    while not gone():
        await asyncio.sleep(_TERMINAL_EVERY_S)
    _end_at_once()


def _end_at_once() -> None:
    """Without a terminal Textual's writing thread is dead and its queue full, and its reading thread never ends."""
    os._exit(_HUNG_UP)


def run_on_terminal(app: App[Any], leave: Any) -> Any:
    """Run an application until it is left; `leave` is called with the number of a signal that asks for it."""

    async def main() -> Any:
        with signals_handled(leave):
            watch = asyncio.create_task(_leave_with_terminal())
            try:
                return await app.run_async()
            finally:
                watch.cancel()

    result = asyncio.run(main())
    if gone():
        _end_at_once()
    return result


def run_dashboard(
    root: Path,
    *,
    child: TrainerProcess | None = None,
    pictures: Pictures = "auto",
    notify: Sequence[str] = (),
    tab: str = "overview",
) -> DashboardResult:
    """Open the dashboard on this terminal; returns when it was left.

    With a `child` (the command started the trainer) leaving a live run asks whether to stop or detach, and so does
    Ctrl-C; without one it just leaves. A stop is requested before this returns "stop": the command then waits for the
    trainer. SIGHUP and SIGTERM restore the terminal and return "detach".

    Raises:
        RuntimeError: a bug of the dashboard ended it; its traceback was printed after the terminal was restored.
    """
    app = DashboardApp(root, child=child, tab=tab, pixels=pixel_widget(pictures), notify=notify)
    result: DashboardResult | None = run_on_terminal(app, app.leave_by_signal)
    if result is None:
        raise RuntimeError("the dashboard ended unexpectedly; the training is not affected")
    return result


def export_screen(
    root: Path, out: Path, *, size: tuple[int, int], screen: str = "overview", light: bool = False
) -> None:
    """Save one tab of the dashboard as a picture, SVG or PNG by the suffix, without a terminal.

    Args:
        root: run directory.
        out: the file.
        size: (columns, rows).
        screen: name of the tab.
        light: with the light theme.

    Raises:
        ResourceError: the file cannot be written.
    """
    app = DashboardApp(root, tab=screen)

    async def photograph(pilot: Pilot[object]) -> None:
        if light:
            app.action_theme()
        await settled(pilot)
        save_screen(app, out, size)
        app.exit(DashboardResult("detach"))

    asyncio.run(app.run_async(headless=True, size=size, auto_pilot=photograph))


async def settled(pilot: Pilot[Any], seconds: float = 30.0) -> None:
    """Wait until the run is read whole and the seen tab, with its pictures, is drawn; at most `seconds`."""
    app, until = pilot.app, time.monotonic() + seconds
    while time.monotonic() < until:
        await pilot.pause(0.05)
        screen = app.screen
        if isinstance(screen, RunScreen) and screen.read_whole:
            for worker in [worker for worker in app.workers if worker.group == "preview"]:
                await worker.wait()
            await pilot.pause(0.05)
            if screen.tab != "runs" or screen.query_one(RunsPane).looked:
                return
