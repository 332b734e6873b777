"""What passes between the commands and the dashboard's application.

`affmae_cli.dashboard.app` offers

    run_dashboard(root: Path, *, child: TrainerProcess | None = None, pictures: Pictures = "auto") -> DashboardResult
    export_screen(root: Path, out: Path, *, size: tuple[int, int], screen: str = "overview") -> None

The first opens the application on a run and returns when it was left; it ends by itself only when the user leaves.
With a `child` (the command started the trainer) leaving a live run asks whether to stop or detach, and so does Ctrl-C;
without one it just leaves. A stop is asked for with `control.request_stop` before it returns "stop": the command then
waits for the trainer and prints its closing lines. SIGHUP and SIGTERM restore the terminal and return "detach".
The second saves the screen as SVG, (columns, rows), without a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


class TrainerProcess(Protocol):
    """A trainer that this process started."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number when it was killed); None while it works."""


Pictures = Literal["auto", "blocks"]
"""How pictures are drawn: as pixels where the terminal can, or always as half blocks."""


@dataclass(frozen=True)
class DashboardResult:
    """How the dashboard was left. ended: the run had ended; stop: the trainer was asked to stop; detach: it goes on."""

    outcome: Literal["ended", "stop", "detach"]
