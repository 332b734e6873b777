"""Every message between the reading thread and the screens. Only these cross from thread to screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.message import Message

from affmae_cli.dashboard.runs import RunRow
from affmae_cli.dashboard.view import Compared, RunView


@dataclass
class RunRead(Message, bubble=False):
    """A moment of the run that is followed."""

    view: RunView

    def can_replace(self, message: Message) -> bool:
        """Only the newest moment is worth drawing."""
        return isinstance(message, RunRead)


@dataclass
class TextRead(Message, bubble=False):
    """The end of the log, config.toml and environment.json. problem: what is wrong with the configuration."""

    root: Path
    log: list[str]
    config: str
    environment: dict[str, Any]
    problem: str

    def can_replace(self, message: Message) -> bool:
        """Each holds everything."""
        return isinstance(message, TextRead)


@dataclass
class ReadingFailed(Message, bubble=False):
    """The reading thread met an error that it did not expect; it goes on."""

    error: Exception


@dataclass
class RunsRead(Message, bubble=False):
    """All runs of the folder, and the curves of those that are compared. problem: an error that was not expected, ""
    for none; rows are then those of the look before, and a run that cannot be read is not compared."""

    rows: list[RunRow]
    compared: list[Compared]
    problem: str = ""

    def can_replace(self, message: Message) -> bool:
        """Each holds everything."""
        return isinstance(message, RunsRead)


@dataclass
class RunChosen(Message):
    """Another run is to be followed."""

    root: Path
