"""The finished rows of a prediction under way, so that one that was stopped or killed goes on where it was.

    .NAME.unfinished/  journal  lock

The folder lies beside the output until that is complete. The journal opens with a JSON line that says what the labels
depend on (weights, image, settings); a prediction that differs in any of it is refused, because half of one and half
of another is neither. Then comes a record per band: a header, the deflated rows, a CRC-32 over both. Records are only
appended, so a kill can tear no more than the last one, which does not count and is cut off.

Axes: C classes, R rows of a band, X columns.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from affmae_engine import atomic
from affmae_engine.errors import ConfigError
from affmae_engine.runtime.locks import FileLock

SYNC_S = 1.0
"""Seconds of work that a power cut may cost. A kill costs none: what was written is in the system's hands."""

_HEADER = struct.Struct("<4sQQIII")  # mark, section, first row, rows, bytes of labels, bytes of probabilities
_MARK = b"band"
_CRC = struct.Struct("<I")
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Finished rows first_row.. of section z: labels [R, X], and probabilities uint8 [C, R, X] where wanted."""

    z: int
    first_row: int
    labels_RX: np.ndarray
    probabilities_CRX: np.ndarray | None = None


@dataclass(frozen=True)
class _Record:
    z: int
    first_row: int
    rows: int
    offset: int
    labels: int
    probabilities: int


class Journal:
    """Context manager that holds the journal of one output for writing; leaving it keeps what is in it.

    Args:
        output: the labels' final name; its folder must exist.
        made_from: everything that the labels depend on; plain JSON values.
        shape_ZYX, dtype: of the labels.
        classes: number of classes where probabilities are kept too; otherwise 0.
        overwrite: an unfinished prediction of another kind gives way instead of being refused.

    Raises (on entering):
        BusyError: another process predicts to this output.
        ConfigError: the unfinished prediction there is another one; says in what.
        ResourceError: the place cannot be written to.
    """

    def __init__(
        self,
        output: Path,
        made_from: Mapping[str, Any],
        *,
        shape_ZYX: tuple[int, int, int],
        dtype: np.dtype[Any],
        classes: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.folder = folder_of(output)
        self._made_from = json.loads(json.dumps(made_from))
        self._shape, self._dtype, self._classes = shape_ZYX, dtype, classes
        self._overwrite = overwrite
        self._lock = FileLock(
            self.folder / "lock", f"{output} is being written", "wait for it, or choose another -o/--out"
        )
        self._records: list[_Record] = []
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        with atomic.translated_write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        self._lock.acquire()
        try:
            with atomic.translated_write_errors(self.folder):
                self._file = self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._records:  # nothing is lost with it
            self.discard()
        self._lock.release()

    @property
    def position(self) -> tuple[int, int]:
        """Section and row that come next; (sections, 0) when all is done."""
        if not self._records:
            return 0, 0
        last = self._records[-1]
        row = last.first_row + last.rows
        return (last.z + 1, 0) if row == self._shape[1] else (last.z, row)

    def pieces(self) -> Iterator[Rows]:
        """What is finished, in order."""
        for record in list(self._records):
            self._file.seek(record.offset)
            labels = self._unpack(self._file.read(record.labels), (record.rows, self._shape[2]), self._dtype)
            scores = None
            if self._classes:
                shape = (self._classes, record.rows, self._shape[2])
                scores = self._unpack(self._file.read(record.probabilities), shape, np.dtype(np.uint8))
            yield Rows(record.z, record.first_row, labels, scores)

    def append(self, rows: Rows) -> None:
        """Add the rows that come next.

        Raises:
            ResourceError: the disk is full or failed; what was there before stays good.
        """
        assert (rows.z, rows.first_row) == self.position, (rows.z, rows.first_row, self.position)
        labels = zlib.compress(np.ascontiguousarray(rows.labels_RX).data, 1)
        scores = b""
        if self._classes:
            assert rows.probabilities_CRX is not None
            scores = zlib.compress(np.ascontiguousarray(rows.probabilities_CRX).data, 1)
        header = _HEADER.pack(_MARK, rows.z, rows.first_row, len(rows.labels_RX), len(labels), len(scores))
        crc = _CRC.pack(zlib.crc32(scores, zlib.crc32(labels, zlib.crc32(header))))
        with atomic.translated_write_errors(self.output):
            start = self._file.seek(0, os.SEEK_END)
            try:
                _write_all(self._file, header + labels + scores + crc)
                if time.monotonic() - self._synced >= SYNC_S:
                    os.fdatasync(self._file.fileno())
                    self._synced = time.monotonic()
            except OSError:
                os.ftruncate(self._file.fileno(), start)
                raise
        self._records.append(
            _Record(rows.z, rows.first_row, len(rows.labels_RX), start + _HEADER.size, len(labels), len(scores))
        )

    def keep_whole_sections(self) -> None:
        """Forget the rows of a section that is not complete."""
        z, row = self.position
        if row:
            first = next(i for i, record in enumerate(self._records) if record.z == z)
            self._cut(self._records[first].offset - _HEADER.size)
            del self._records[first:]

    def discard(self) -> None:
        """Delete the journal; its output is complete, or nothing of it can be used."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> IO[bytes]:
        """The journal, its intact records read; a new one where there is none to go on from."""
        path = self.folder / "journal"
        line = json.dumps(self._made_from, sort_keys=True).encode() + b"\n"
        if path.is_file():
            file = path.open("r+b", buffering=0)
            head = file.readline(_LONGEST_LINE)
            if head == line:
                self._file = file
                self._cut(self._scan(len(line)))
                return file
            before = _parsed(head)
            if before is not None and not self._overwrite and file.seek(0, os.SEEK_END) > len(head):
                file.close()
                self._refuse(before)
            file.close()
        atomic.commit_bytes(path, line)
        return path.open("r+b", buffering=0)

    def _refuse(self, before: dict[str, Any]) -> None:
        keys = {*before, *self._made_from}
        differing = sorted(key for key in keys if before.get(key) != self._made_from.get(key))
        raise ConfigError(
            f"there is an unfinished prediction to {self.output} with another {', '.join(differing).replace('_', ' ')}",
            "start it with the same model, image and options to complete it, or begin anew with --overwrite",
        )

    def _scan(self, offset: int) -> int:
        """Read the records from `offset` on; returns where the intact part ends."""
        while True:
            self._file.seek(offset)
            header = self._file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return offset
            mark, z, first_row, rows, labels, scores = _HEADER.unpack(header)
            fits = (z, first_row) == self.position and 0 < rows <= self._shape[1] - first_row
            if mark != _MARK or not fits or z >= self._shape[0]:
                return offset
            body = self._file.read(labels + scores + _CRC.size)
            if len(body) < labels + scores + _CRC.size:
                return offset
            if zlib.crc32(body[: -_CRC.size], zlib.crc32(header)) != _CRC.unpack(body[-_CRC.size :])[0]:
                return offset
            self._records.append(_Record(z, first_row, rows, offset + _HEADER.size, labels, scores))
            offset += len(header) + len(body)

    def _cut(self, length: int) -> None:
        os.ftruncate(self._file.fileno(), length)

    @staticmethod
    def _unpack(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        values = zlib.decompressobj().decompress(data, int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(values, dtype).reshape(shape)


def folder_of(output: Path) -> Path:
    """Where the journal of an output lies."""
    return output.with_name(f".{atomic.short_stem(output.name)}.unfinished")


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Unbuffered files may take less than they were given; what they refuse raises at the next call."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _parsed(head: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(head)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
