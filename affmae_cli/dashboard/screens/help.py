"""Help: every key of the screen below, from its bindings, and what the words of the status line mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from affmae_cli.dashboard.signs import SIGNS
from affmae_cli.dashboard.widgets.figures import Figure, Figures

_MEANINGS = {
    "waiting": "the trainer begins, or works on the first step",
    "running": "steps come in",
    "stalled": "no step for much longer than usual",
    "finished": "all steps are done",
    "stopped": "ended on request, after a checkpoint",
    "failed": "ended with an error; the log has it",
    "gone": "the trainer ended without a word: killed, or the machine went down",
}


class HelpScreen(ModalScreen[None]):
    """Closed by any of the keys that one would try."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter", "dismiss", "Close", id="help.close"),
    ]

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        """Keys, then states."""
        with VerticalScroll(id="help"):
            keys = Figures("keys (Esc closes)", id="help-keys")
            keys.rows = tuple(Figure(key, text) for key, text in self._keys)
            yield keys
            states = Figures("states", id="help-states")
            states.rows = tuple(Figure(f"{SIGNS[kind]} {kind}", text) for kind, text in _MEANINGS.items())
            yield states
            yield Static("The mouse works too: tabs, columns, buttons; the wheel zooms a chart.", id="help-mouse")
