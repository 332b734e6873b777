"""Every message between the reading thread and the screens. Only these cross from thread to screen."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from affmae_cli.dashboard.view import RunView


@dataclass
class RunRead(Message, bubble=False):
    """A moment of the run that is followed."""

    view: RunView

    def can_replace(self, message: Message) -> bool:
        """Only the newest moment is worth drawing."""
        return isinstance(message, RunRead)


@dataclass
class TextRead(Message, bubble=False):
    """The end of the log and the configuration, as text. problem: what is wrong with the configuration."""

    log: list[str]
    config: str
    problem: str

    def can_replace(self, message: Message) -> bool:
        """Each holds everything."""
        return isinstance(message, TextRead)


@dataclass
class ReadingFailed(Message, bubble=False):
    """The reading thread met an error that it did not expect; it goes on."""

    error: Exception
