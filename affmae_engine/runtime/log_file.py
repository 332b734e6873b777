"""The engine's log as a file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

_engine = logging.getLogger("affmae_engine")


class _LogFile(logging.FileHandler):
    """A log file whose failure (full disk) has no consequences."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what the engine logs, from INFO on, to a file."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = _engine.level
    _engine.addHandler(handler)
    _engine.setLevel(logging.INFO)
    try:
        yield
    finally:
        _engine.removeHandler(handler)
        _engine.setLevel(level)
        handler.close()
