"""A question with a few answers, each a button and a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Label


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
        """The question, a button for each answer, and how to cancel."""
        with Vertical(id="question"):
            yield Label(self._question, id="question-text", markup=False)
            for answer in self._answers:
                yield Button(f"[b]{answer.key}[/b]  {answer.text}", id=f"answer-{answer.value}", variant=answer.variant)
                if answer.meaning:
                    yield Label(answer.meaning, classes="meaning", markup=False)
            yield Label("Esc  cancel", classes="meaning", markup=False)

    def on_key(self, event: events.Key) -> None:
        """An answer's own key."""
        for answer in self._answers:
            if event.key == answer.key:
                event.stop()
                self.dismiss(answer.value)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss((event.button.id or "").removeprefix("answer-"))

    def action_cancel(self) -> None:
        """No answer."""
        self.dismiss(None)
