"""Following files that another process appends to: bytes in, whole lines out. Nothing here knows what a line means.

Only bytes up to the last line end are taken, so a line that is being written is read when it is complete. The file is
opened anew for every read, which also makes network file systems show what is new. It starts over when the file was
replaced, cut, or rewritten in place: the bytes before the position must be those that were read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from affmae_engine.errors import AffmaeError, of_system

CHUNK = 1 << 20
"""Bytes of one read. No event is nearly as long, so a chunk without a line end is damage and is skipped."""
_REMEMBERED = 64


@dataclass(frozen=True)
class Lines:
    """Whole lines. data: ends with a line end, or is empty. offset: where in the file they begin. restarted: the file
    was replaced or cut, so everything read before is void. more: there is more to read at once."""

    data: bytes
    offset: int
    restarted: bool
    more: bool


class LineTail:
    """Reads a growing file once, chunk by chunk. A missing file is one without lines, so it may appear later.

    refusal: why the system refused it the last time, None when it did not; what was read before stays read.
    """

    def __init__(self, path: Path, *, chunk: int = CHUNK) -> None:
        self._path = path
        self._chunk = chunk
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""
        self.refusal: AffmaeError | None = None

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._offset

    def read(self) -> Lines:
        """The next lines, at most one chunk. Never raises for what the file holds or lacks."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            self.refusal = None
            return self._gone()
        except OSError as error:
            self.refusal = of_system(error)
            return Lines(b"", self._offset, False, False)
        self.refusal, restarted = None, False
        try:
            restarted = self._is_another(descriptor)
            if restarted:
                self._forget()
            status = os.fstat(descriptor)
            self._identity = (status.st_dev, status.st_ino)
            data = os.pread(descriptor, self._chunk, self._offset)
        except OSError:
            return Lines(b"", self._offset, restarted, False)
        finally:
            os.close(descriptor)
        full = len(data) == self._chunk
        end = data.rfind(b"\n") + 1
        lines = Lines(data[:end], self._offset, restarted, full)
        if not end and full:  # passed over; its rest, up to a line end, is a line that means nothing
            end = len(data)
        self._offset += end
        self._before = (self._before + data[max(0, end - _REMEMBERED) : end])[-_REMEMBERED:]
        return lines

    def _gone(self) -> Lines:
        restarted = self._offset > 0
        self._forget()
        return Lines(b"", 0, restarted, False)

    def _is_another(self, descriptor: int) -> bool:
        if not self._offset:
            return False
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != self._identity or status.st_size < self._offset:
            return True
        start = self._offset - len(self._before)
        return os.pread(descriptor, len(self._before), start) != self._before

    def _forget(self) -> None:
        self._identity, self._offset, self._before = None, 0, b""


def tail_bytes(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a file, from the beginning of a line on; b"" when it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - limit)
            # One byte more tells whether the piece begins with a line.
            file.seek(max(0, start - 1))
            data = file.read(limit + 1)
    except OSError:
        return b""
    return data[data.find(b"\n") + 1 :] if start else data
