"""Alerts of the run that is watched: it finished, failed, stalled, diverged, or had a loss that is not finite.

Each is told once, by the terminal's bell, as a desktop notification in terminals that know OSC 9 or 777, and by a
command of the user's. What had already happened when the run was opened is not told.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import one_line
from affmae_cli.dashboard.verdicts import diverged


class Alerts:
    """Remembers what was told of one run."""

    def __init__(self) -> None:
        self._told: dict[str, object] | None = None

    def of(self, model: RunModel) -> list[str]:
        """What is new since the last call, as sentences."""
        if model.opening:
            return []
        status, skipped = model.status, model.latest.skipped if model.latest else 0
        state = status.kind if status.ended or status.kind == "stalled" else ""
        now: dict[str, object] = {"state": state, "diverged": diverged(model.steps), "skipped": skipped}
        before, self._told = self._told, now
        if before is None:
            return []
        name, found = one_line(model.root.name), []
        if state and state != before["state"]:
            text = one_line(status.text)
            found.append(f"{name} {text}" if text.startswith(state) else f"{name} {state}: {text}")
        if now["diverged"] and not before["diverged"]:
            found.append(f"{name} diverges: the loss is higher than at the start")
        if isinstance(before["skipped"], int) and skipped > before["skipped"]:
            found.append(f"{name}: {skipped - before['skipped']} steps with a loss or gradient that is not finite")
        return found


def escape_sequences(message: str) -> str:
    """A desktop notification for terminals that know OSC 9 (iTerm2, WezTerm, kitty) or OSC 777 (foot, rxvt)."""
    text = "".join(c for c in message if c.isprintable()).replace(";", ",")
    return f"\x1b]9;{text}\x07\x1b]777;notify;affmae;{text}\x07"


def run_command(command: Sequence[str], message: str) -> str:
    """Start the user's command with the message as its last argument, without a shell; returns why it did not start."""
    try:
        subprocess.Popen(
            [*command, message],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"--notify {command[0]}: {error.strerror}"
    return ""
