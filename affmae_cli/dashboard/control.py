"""What a viewer asks of a trainer: an empty file in the run's control/. The trainer takes it within two seconds, says
so in an event (`request`), and meets it after the step that is under way.
"""

from __future__ import annotations

from pathlib import Path

from affmae_engine import atomic
from affmae_engine.run_dir import CHECKPOINT, STOP, RunDir


def request_stop(root: Path) -> None:
    """Ask the trainer to save a checkpoint and end.

    Raises:
        ResourceError: the folder cannot be written to.
    """
    _request(root, STOP)


def request_checkpoint(root: Path) -> None:
    """Ask the trainer to save a checkpoint now and go on.

    Raises:
        ResourceError: the folder cannot be written to.
    """
    _request(root, CHECKPOINT)


def pending_requests(root: Path) -> list[str]:
    """Requests that the trainer has not taken yet."""
    return [name for name in (STOP, CHECKPOINT) if (RunDir(root).control / name).exists()]


def _request(root: Path, name: str) -> None:
    path = RunDir(root).control / name
    with atomic.translated_write_errors(path):
        path.touch()
