"""What a viewer asks of a trainer: an empty file in the run's control/. The trainer takes it within two seconds, says
so in an event (`request`), and meets it after the step that is under way.

Also what passes between the commands and the dashboard: `TrainerProcess` and `DashboardResult`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Pictures = Literal["auto", "blocks"]
"""How pictures are drawn: as pixels where the terminal can, or always as half blocks."""


class TrainerProcess(Protocol):
    """A trainer that this process started."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number when it was killed); None while it works."""


@dataclass(frozen=True)
class DashboardResult:
    """How the dashboard was left. ended: the run had ended; stop: the trainer was asked to stop; detach: it goes on."""

    outcome: Literal["ended", "stop", "detach"]


def request(root: Path, name: str) -> None:
    """Ask the trainer of a run for one of `run_dir.REQUESTS`.

    Raises:
        ResourceError: the folder cannot be written to.
    """
    from affmae_engine import atomic  # the help of the commands, which import `Pictures`, needs none of this
    from affmae_engine.run_dir import RunDir

    path = RunDir(root).control / name
    with atomic.translated_write_errors(path):
        path.touch()
