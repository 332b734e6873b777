"""Screens above the run: a question, all keys on one page, and a chart or picture on the whole screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.table import Table
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Button, Footer, Label, Static

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.run_model import RunModel


@dataclass(frozen=True)
class Answer:
    """One answer: what it returns, the key that gives it, its text, what it means, and the colour of its button."""

    value: str
    key: str
    text: str
    meaning: str = ""
    variant: Literal["default", "primary", "warning", "error"] = "default"


class Question(ModalScreen[str | None]):
    """Returns the value of the chosen answer; None when it was cancelled."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel", id="question.cancel"),
        Binding("up,left", "app.focus_previous", "Previous", id="question.previous", show=False),
        Binding("down,right", "app.focus_next", "Next", id="question.next", show=False),
    ]

    def __init__(self, question: str, answers: Sequence[Answer]) -> None:
        super().__init__()
        self._question, self._answers = question, answers

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Label(self._question, id="question-text", markup=False)
            for answer in self._answers:
                yield Button(f"[b]{answer.key}[/b]  {answer.text}", id=f"answer-{answer.value}", variant=answer.variant)
                if answer.meaning:
                    yield Label(answer.meaning, classes="meaning", markup=False)
            yield Label("Esc  cancel", classes="meaning", markup=False)

    def on_key(self, event: events.Key) -> None:
        for answer in self._answers:
            if event.key == answer.key:
                event.stop()
                self.dismiss(answer.value)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss((event.button.id or "").removeprefix("answer-"))

    def action_cancel(self) -> None:
        self.dismiss(None)


class HelpScreen(ModalScreen[None]):
    """Keys by where they work: {heading: [(key, meaning)]}."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss", "Close")]

    def __init__(self, keys: dict[str, list[tuple[str, str]]]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        # Two columns of headings, about equally high.
        columns: list[Table] = []
        half = sum(len(keys) + 2 for keys in self._keys.values()) / 2
        height = 0.0
        for heading, keys in self._keys.items():
            if not columns or (len(columns) == 1 and height + len(keys) / 2 > half):
                columns.append(Table.grid(padding=(0, 1)))
            columns[-1].add_row(Text(heading, "bold"), "")
            for key, meaning in keys:
                columns[-1].add_row(Text(key), Text(meaning, "dim"))
            columns[-1].add_row("", "")
            height += len(keys) + 2
        page = Table.grid(padding=(0, 2), expand=True)
        page.add_row(*columns)
        with VerticalScroll(id="help"):
            yield Static(page)


class FullScreen(Screen[None]):
    """A chart or a picture alone. `take` redraws it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "dismiss", "Back", priority=True),
        Binding("question_mark", "app.help", "Help", show=False),
    ]

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self.widget = widget

    def compose(self) -> ComposeResult:
        yield self.widget
        yield Footer(show_command_palette=False)

    def take(self, model: RunModel) -> None:
        if isinstance(self.widget, Chart) and self.widget.model is not None:
            self.widget.take(model)


def enlarged(widget: Widget) -> FullScreen | None:
    """A full screen of the same content; None for what has none."""
    if isinstance(widget, Chart):
        chart = Chart(widget.spec)
        chart.model, chart.curves = widget.model, widget.curves
        chart.set_reactive(Chart.view, widget.view)
        chart.border_title = widget.border_title
        return FullScreen(chart)
    if isinstance(widget, PictureGrid):
        grid = PictureGrid(main_only=widget.main_only)
        grid.preview, grid.border_title = widget.preview, widget.border_title
        for name in (PictureGrid.path, PictureGrid.stamp, PictureGrid.first, PictureGrid.zoomed, PictureGrid.pixels):
            grid.set_reactive(name, getattr(widget, name.name))
        return FullScreen(grid)
    return None
