"""The start screen, which `affmae` without arguments opens in a terminal: what is in this folder, what to do next."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from affmae_cli.dashboard.app import ThemedApp, run_on_terminal
from affmae_cli.dashboard.dialogs import HelpScreen
from affmae_cli.dashboard.forms import FormScreen
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.runs import RunsFolder, best_score
from affmae_cli.dashboard.text import SIGNS, cut, one_line
from affmae_cli.dashboard.verdicts import headline

COMMANDS = {"i": "ingest", "p": "pretrain", "f": "finetune", "r": "predict", "o": "objects"}
"""Commands with a form, by their keys; those that do not exist are left out."""
SECONDS_BETWEEN_LOOKS = 3.0
_PICTURES = (".tif", ".tiff", ".png", ".jpg", ".mrc", ".h5", ".hdf5", ".dm3", ".dm4", ".czi", ".nd2")


@dataclass(frozen=True)
class Item:
    """Something in the folder. kind: dataset, run, model or result. action: words of the command that opens it, or the
    name of a form with what is filled in there."""

    kind: str
    path: Path
    state: str
    about: str
    action: tuple[str, ...] = ()
    form: str = ""
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Folder:
    """What was found, and the next step: a sentence, and the form that does it with what is filled in."""

    items: tuple[Item, ...]
    advice: str
    form: str
    values: Mapping[str, str] = field(default_factory=dict)


def look(folder: Path, runs: RunsFolder) -> Folder:
    """Datasets, runs, models and results in `folder`, `folder`/data, `folder`/runs and `folder`/predictions."""

    def shown(path: Path) -> Path:
        return path.relative_to(folder) if path.is_relative_to(folder) else path

    # Zarr groups say what they are; everything in predictions/ was written by `affmae predict`.
    datasets, results = [], []
    for path in sorted([*folder.glob("*.zarr"), *folder.glob("data/*.zarr"), *folder.glob("predictions/*")]):
        attributes = _attributes(path)
        if "affmae" in attributes:
            count = attributes["affmae"].get("images") if isinstance(attributes["affmae"], dict) else None
            about = f"{count} image{'s' if count != 1 else ''}" if isinstance(count, int) else ""
            values = {"data": str(shown(path))}
            datasets.append(Item("dataset", shown(path), "ready", about, form="pretrain", values=values))
        elif "affmae_prediction" in attributes or (
            path.parent.name == "predictions" and path.suffix in (".tif", ".zarr")
        ):
            results.append(Item("result", shown(path), "", _size(path), action=("check", str(shown(path)))))
    models = runs.runs()
    found = [_run_item(model, shown(model.root)) for model in models]
    usable = [m for m in models if m.task == "finetune" and math.isfinite(best_score(m, "finetune"))]
    weights = [
        Item(
            "model",
            shown(model.root),
            f"IoU {best_score(model, 'finetune'):.3f}",
            f"classes {', '.join(map(one_line, model.classes))}",
            form="predict",
            values={"model": str(shown(model.root))},
        )
        for model in usable
    ]
    items = (*datasets, *found, *weights, *results)
    return Folder(items, *_advice(folder, datasets, models, usable, results, shown))


def _advice(
    folder: Path,
    datasets: list[Item],
    models: list[RunModel],
    usable: list[RunModel],
    results: list[Item],
    shown: Callable[[Path], Path],
) -> tuple[str, str, Mapping[str, str]]:
    """The next step of the usual way: ingest, pretrain, finetune, predict."""
    live = [model for model in models if not model.status.ended]
    if live:
        return f"{one_line(live[0].root.name)} is training: Enter watches it", "", {}
    if not datasets and not models:
        pictures = sorted(
            {path.parent for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file()}
        )
        source = str(shown(pictures[0])) if pictures else ""
        where = f"{source} has images: " if source and source != "." else ""
        return f"{where}i collects images into a dataset", "ingest", {"sources": source} if source else {}
    pretrained = [model for model in models if model.task == "pretrain" and model.status.kind == "finished"]
    if usable:
        done = "predict further images" if results else "predict images with it"
        return (
            f"{one_line(usable[0].root.name)} is a trained model: r to {done}",
            "predict",
            {"model": str(shown(usable[0].root))},
        )
    if pretrained:
        values = {"init_from": str(shown(pretrained[0].root))}
        return f"{one_line(pretrained[0].root.name)} is pretrained: f to finetune it on labels", "finetune", values
    return "p to pretrain on the dataset", "pretrain", datasets[0].values if datasets else {}


def _run_item(model: RunModel, path: Path) -> Item:
    state = f"{SIGNS[model.status.kind]} {model.status.kind}"
    about = headline(model).text if model.latest else one_line(model.status.text)
    return Item("run", path, f"{model.task or '?'} {state}", about, action=("watch", str(path)))


def _attributes(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "zarr.json").read_text("utf-8")).get("attributes", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size / 2**20:.2f} MiB" if path.is_file() else ""
    except OSError:
        return ""


class HomeScreen(Screen[None]):
    """The list and the next step."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open"),
        *(Binding(key, f"form('{name}')", name.capitalize()) for key, name in COMMANDS.items()),
        Binding("n", "next", "Next step"),
        Binding("t", "app.theme", "Theme", show=False),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("q", "app.quit", "Quit"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-middle"), (160, "-wide")]  # noqa: RUF012 (as Textual declares it)

    def __init__(self, folder: Path, commands: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self._folder, self._commands = folder, commands
        self._runs = RunsFolder(folder / "runs")
        self.found: Folder | None = None

    def compose(self) -> ComposeResult:
        home = Path.home()
        place = f"~/{self._folder.relative_to(home)}" if self._folder.is_relative_to(home) else str(self._folder)
        yield Static(Text.assemble(("affmae", "bold"), f"   {one_line(place)}"), id="home-title")
        yield Static("", id="home-next", markup=False)
        yield DataTable(id="home-table", cursor_type="row", classes="panel")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).border_title = "in this folder"
        self._look()
        self.set_interval(SECONDS_BETWEEN_LOOKS, self._look)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _look(self) -> None:
        found = look(self._folder, self._runs)
        self.app.call_from_thread(self._show, found)

    def on_resize(self) -> None:
        if self.found is not None:
            found, self.found = self.found, None
            self._show(found)

    def _show(self, found: Folder) -> None:
        if found == self.found:
            return
        self.found = found
        text = Text.assemble(("Next: ", "bold"), found.advice)
        self.query_one("#home-next", Static).update(text)
        table = self.query_one(DataTable)
        row = table.cursor_row
        table.clear(columns=True)
        width = self.size.width - 6
        path = min(max([len(str(item.path)) for item in found.items] or [16]), 40)
        state = min(max([len(item.state) for item in found.items] or [8]), 24)
        about = max(10, width - 9 - path - state - 8)
        for title, columns in (("kind", 9), ("name", path), ("state", state), ("", about)):
            table.add_column(title, width=columns)
        for item in found.items:
            cells = (item.kind, one_line(str(item.path)), one_line(item.state), cut(one_line(item.about), about))
            table.add_row(*(Text(cell, no_wrap=True) for cell in cells))
        if not found.items:
            table.add_row(
                Text("-"), Text("nothing here yet"), Text(""), Text("`affmae demo` shows everything on generated data")
            )
        elif row < len(found.items):
            table.move_cursor(row=row)
        table.focus()

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        at = self.query_one(DataTable).cursor_row
        items = self.found.items if self.found else ()
        if at < len(items):
            item = items[at]
            if item.action:
                self.app.exit(list(item.action))
            else:
                self._form(item.form, item.values)

    def action_next(self) -> None:
        if self.found is not None and self.found.form:
            self._form(self.found.form, self.found.values)
        else:
            self.action_open()

    def action_form(self, name: str) -> None:
        found = self.found
        self._form(name, found.values if found is not None and found.form == name else {})

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Only commands that exist."""
        return action != "form" or parameters[0] in self._commands

    def _form(self, name: str, values: Mapping[str, str]) -> None:
        def run(words: list[str] | None) -> None:
            if words is not None:
                self.app.exit(words)

        self.app.push_screen(FormScreen(name, self._commands[name], values), run)


class HomeApp(ThemedApp):
    """The start screen; returns the words of a command to run, None when it was left."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c,ctrl+q", "quit", "Quit", show=False, priority=True)]

    def __init__(self, folder: Path, commands: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self._folder, self._commands = folder, commands

    def on_mount(self) -> None:
        self.push_screen(HomeScreen(self._folder, self._commands))

    def leave_by_signal(self, _number: int) -> None:
        """The session ends."""
        self.exit(None)

    def action_help(self) -> None:
        keys = [b for b in HomeScreen.BINDINGS if isinstance(b, Binding) and b.show]
        found = [(self.get_key_display(b), b.description) for b in keys]
        forms = [("^r", "Run the command that is shown"), ("tab", "Next field"), ("esc", "Back")]
        self.push_screen(HelpScreen({"Start screen": found, "Forms": forms}))


def home(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Show the start screen, run what was chosen there in this terminal, and come back to it until it is left.

    Args:
        commands: functions of the commands with a form, by name.
    """
    while True:
        app = HomeApp(Path.cwd(), commands)
        words: list[str] | None = run_on_terminal(app, app.leave_by_signal)
        if words is None:
            return
        print(f"$ {shlex.join(['affmae', *words])}", flush=True)
        before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command
        try:
            subprocess.run([sys.executable, "-m", "affmae_cli", *words], check=False)
        finally:
            signal.signal(signal.SIGINT, before)
        if words[0] != "watch":
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                input("\nEnter returns to the start screen ")
