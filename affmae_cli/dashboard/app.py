"""The dashboard's application: themes, the keys that every screen has, and how it is left.

`run_dashboard` opens it on a terminal, `export_screen` saves one screen without a terminal. It reads run directories
and writes requests; the training neither knows nor notices.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.pilot import Pilot
from textual.widget import Widget

from affmae_cli.dashboard import theme
from affmae_cli.dashboard.control import request_stop
from affmae_cli.dashboard.pixels import pixel_widget
from affmae_cli.dashboard.result import DashboardResult, Pictures, TrainerProcess
from affmae_cli.dashboard.screens.help import HelpScreen
from affmae_cli.dashboard.screens.question import Answer, Question
from affmae_cli.dashboard.screens.run import RunScreen
from affmae_cli.dashboard.terminal import gone, signals_handled
from affmae_cli.output import printable
from affmae_engine import atomic
from affmae_engine.errors import AffmaeError

_TERMINAL_EVERY_S = 2.0
_HUNG_UP = 129
"""Exit code of a process that SIGHUP ended."""


class DashboardApp(App[DashboardResult]):
    """The application on one run.

    Args:
        root: run directory.
        child: the run's trainer, where the command that opened the dashboard started it.
        tab: which tab is seen first.
        pixels: what draws pictures as pixels, see `pixels.pixel_widget`; None for half blocks.
    """

    CSS_PATH = "dashboard.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,ctrl+q", "leave", "Leave", id="app.leave", show=False, priority=True),
    ]

    def __init__(
        self,
        root: Path,
        *,
        child: TrainerProcess | None = None,
        tab: str = "overview",
        pixels: type[Widget] | None = None,
    ) -> None:
        super().__init__()
        self.register_theme(theme.DARK)
        self.register_theme(theme.LIGHT)
        self.theme = theme.DARK.name
        self._root, self._child, self._first_tab, self._pixels = root, child, tab, pixels
        self._leaving: Question | None = None

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """Colours of curves, for every theme."""
        return theme.series_variables(dark=self.current_theme.dark)

    def on_mount(self) -> None:
        """Open the run."""
        self.push_screen(RunScreen(self._root, self._exit_code, self._first_tab, self._pixels))

    def action_theme(self) -> None:
        """Dark or light."""
        self.theme = (theme.LIGHT if self.current_theme.dark else theme.DARK).name

    def action_help(self) -> None:
        """Every key of the present screen."""
        if isinstance(self.screen, RunScreen):
            shown = {a.binding.id: a.binding for a in self.screen.active_bindings.values() if a.binding.id}
            keys = [
                (self.get_key_display(binding), binding.tooltip or binding.description) for binding in shown.values()
            ]
            self.push_screen(HelpScreen(keys))

    @work
    async def action_leave(self) -> None:
        """Leave; with a trainer of ours at work, ask what becomes of it. Asked for twice, it goes on."""
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
        """The terminal or the session ends: give it back in order. Training goes on."""
        if gone():
            _end_at_once()
        self.exit(DashboardResult("detach"))

    def _stop(self) -> None:
        try:
            request_stop(self._root)
        except AffmaeError as error:
            self.notify(error.message, severity="error", markup=False)
            return
        self.exit(DashboardResult("stop"))

    def _exit_code(self, root: Path) -> int | None:
        return self._child.poll() if self._child is not None and root == self._root else None

    def _trainer_ended(self, child: TrainerProcess) -> bool:
        """Of our own run, whatever other one is looked at and however old what is drawn."""
        if child.poll() is not None:
            return True
        read = (screen.newest for screen in self.screen_stack if isinstance(screen, RunScreen))
        return any(view is not None and view.root == self._root and view.status.ended for view in read)


async def _leave_with_terminal() -> None:
    """A terminal may go without a word, as for a process that ignores SIGHUP."""
    while not gone():
        await asyncio.sleep(_TERMINAL_EVERY_S)
    _end_at_once()


def _end_at_once() -> None:
    """Without a terminal Textual's writing thread is dead and its queue full, its reading thread never ends, and nobody
    is left to tell anything."""
    os._exit(_HUNG_UP)


def run_dashboard(root: Path, *, child: TrainerProcess | None = None, pictures: Pictures = "auto") -> DashboardResult:
    """Open the dashboard on this terminal; returns when it was left. See `result` for what it returns when.

    Raises:
        RuntimeError: a bug of the dashboard ended it; its traceback was printed after the terminal was restored.
    """
    app = DashboardApp(root, child=child, pixels=pixel_widget(pictures))

    async def main() -> DashboardResult | None:
        with signals_handled(app.leave_by_signal):
            watch = asyncio.create_task(_leave_with_terminal())
            try:
                return await app.run_async()
            finally:
                watch.cancel()

    result = asyncio.run(main())
    if gone():
        _end_at_once()
    if result is None:
        raise RuntimeError("the dashboard ended unexpectedly; the training is not affected")
    return result


def export_screen(root: Path, out: Path, *, size: tuple[int, int], screen: str = "overview") -> None:
    """Save one tab of the dashboard as SVG, without a terminal.

    Args:
        root: run directory.
        out: the file.
        size: (columns, rows).
        screen: name of the tab.

    Raises:
        ResourceError: the file cannot be written.
    """
    app = DashboardApp(root, tab=screen)
    pictures: list[str] = []

    async def photograph(pilot: Pilot[object]) -> None:
        await settled(pilot)
        pictures.append(app.export_screenshot(title=f"affmae watch {printable(root.name)}"))
        app.exit(DashboardResult("detach"))

    asyncio.run(app.run_async(headless=True, size=size, auto_pilot=photograph))
    atomic.commit_text(out, pictures[0])


async def settled(pilot: Pilot[Any], seconds: float = 30.0) -> None:
    """Wait until the run is read whole and the seen tab, with its pictures, is drawn; at most `seconds`."""
    app, until = pilot.app, time.monotonic() + seconds
    while time.monotonic() < until:
        await pilot.pause(0.05)
        screen = app.screen
        if isinstance(screen, RunScreen) and screen.read_whole:
            for worker in [worker for worker in app.workers if worker.group == "preview"]:
                await worker.wait()
            await pilot.pause()
            return
