"""Exclusive locks on files, for one process at a time; the kernel releases a lock when its holder dies.

The locked file holds "process N on HOST", so that messages can name the holder. (The library `filelock` empties the
file when it tries to take the lock, so the name would be lost.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from affmae_engine import atomic
from affmae_engine.errors import BusyError, ResourceError

_HOLDER = re.compile(r"process (\d+) on (.+)")
_LONGEST_HOLDER = 512
_ATTEMPTS = 5
_RETRY_S = 0.02


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. state: "held" (by a live process), "free", "unknown" (the file system cannot tell).
    process and host: of the present or the last holder, where the file names it."""

    state: Literal["held", "free", "unknown"]
    process: int | None = None
    host: str = ""


class FileLock:
    """A lock that this process takes with `acquire` or by entering a `with` block.

    Args:
        path: the lock's own file; it is created and stays.
        subject: start of the message when another process holds it, as in "runs/em is in use".
        hint: what to do then.
    """

    def __init__(self, path: Path, subject: str, hint: str) -> None:
        self._path, self._subject, self._hint = path, subject, hint
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BusyError: another process holds it; names that process.
            ResourceError: the file cannot be written to, or its file system has no locks.
        """
        with contextlib.ExitStack() as undo:
            with atomic.translated_write_errors(self._path):
                file = undo.enter_context(self._path.open("a+", encoding="utf-8"))
            try:
                _lock(file.fileno())
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read(_LONGEST_HOLDER).strip() or "another process"
                raise BusyError(f"{self._subject} by {holder}", self._hint) from error
            except OSError as error:
                raise ResourceError(
                    f"cannot lock {self._path}: {error.strerror}", "choose a folder on another file system"
                ) from error
            with contextlib.suppress(OSError):  # the name only serves messages; a full disk is reported elsewhere
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            undo.pop_all()
            self._file = file

    def release(self) -> None:
        """Let go of the lock; nothing happens when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder_of(path: Path) -> Holder:
    """Who holds the lock of this file, without disturbing the holder."""
    try:
        with path.open("rb") as file:
            found = _HOLDER.fullmatch(file.read(_LONGEST_HOLDER).decode("utf-8", "replace").strip())
            process, host = (int(found[1]), found[2]) if found else (None, "")
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released an instant later, when the file is closed
            except BlockingIOError:
                return Holder("held", process, host)
    except FileNotFoundError:
        return Holder("free")
    except OSError:
        return Holder("unknown")
    # Not every network file system passes locks on: that another machine's lock looks free proves nothing.
    return Holder("free" if host in ("", socket.gethostname()) else "unknown", process, host)


def _lock(descriptor: int) -> None:
    # `holder_of` in another process holds the lock for an instant, so one failed attempt proves nothing.
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_RETRY_S)
