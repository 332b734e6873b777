"""The ledger of a store: an append-only log of what is finished, the truth about a store's content.

One JSON object a line. `begin` opens an image (with everything that identifies it), `chunk` says that one shard is on
the device, `image` and `labels` close an image or its labels with the final record, `drop` takes an image back. A line
is written only after the data it speaks of was synced, so a line never promises too much; a torn last line, from a
crash or a power cut, is ignored and cut off by the next writer. A reader therefore knows without guessing that a shard
file which the ledger names and the folder lacks is missing, not empty.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affmae_engine import atomic
from affmae_engine.data.store_layout import SCHEMA_VERSION, StoredImage
from affmae_engine.errors import CorruptError, InputError


@dataclass
class Begun:
    """An image that was begun and not finished."""

    identity: dict[str, Any]
    chunks: set[str] = field(default_factory=set)


@dataclass
class LedgerState:
    """Everything that the ledger says, replayed."""

    images: dict[str, StoredImage] = field(default_factory=dict)
    begun: dict[str, Begun] = field(default_factory=dict)
    valid_bytes: int = 0
    """Length of the intact part of the file."""


def replay(path: Path) -> LedgerState:
    """Read a ledger from start to end.

    Raises:
        InputError: there is none: this is not a store of ours.
        CorruptError: a line other than the last is damaged, or the ledger was written by a newer version.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path.parent.parent} is not a dataset: it has no ledger", "make one with `affmae ingest`"
        ) from error
    state = LedgerState()
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            _apply(state, json.loads(line))
        except CorruptError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CorruptError(
                f"{path}: line {number} is damaged", "delete the dataset folder and ingest again"
            ) from error
        state.valid_bytes += len(line)
    return state


class Ledger:
    """Appends to a ledger; used by the one process that holds the store's lock. Thread-safe."""

    def __init__(self, path: Path, valid_bytes: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        with atomic.translated_write_errors(path):
            self._file = path.open("r+b")
            self._file.truncate(valid_bytes)  # a torn last line of a writer that was killed
            self._file.seek(valid_bytes)

    def append(self, event: str, **values: Any) -> None:
        """Add one line and sync it."""
        line = json.dumps({"event": event, **values}, ensure_ascii=True, allow_nan=False) + "\n"
        with self._lock, atomic.translated_write_errors(self._path):
            self._file.write(line.encode())
            self._file.flush()
            os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_compact(path: Path, state: LedgerState) -> None:
    """Replace a ledger by the shortest one that says the same."""
    lines: list[dict[str, Any]] = [{"event": "ledger", "schema": SCHEMA_VERSION}]
    lines += [{"event": "image", "record": image.to_dict()} for image in state.images.values()]
    for name, begun in state.begun.items():
        lines.append({"event": "begin", "name": name, "identity": begun.identity})
        lines += [{"event": "chunk", "name": name, "key": key} for key in sorted(begun.chunks)]
    atomic.commit_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _apply(state: LedgerState, line: dict[str, Any]) -> None:
    match line["event"]:
        case "ledger":
            if line["schema"] > SCHEMA_VERSION:
                raise CorruptError(
                    f"the dataset has schema version {line['schema']}, this program knows up to {SCHEMA_VERSION}",
                    "update affmae",
                )
        case "begin":
            state.begun[line["name"]] = Begun(line["identity"])
        case "chunk":
            state.begun[line["name"]].chunks.add(line["key"])
        case "image":
            image = StoredImage.from_dict(line["record"])
            state.images[image.name] = image
            state.begun.pop(image.name, None)
        case "drop":
            state.begun.pop(line["name"], None)
            state.images.pop(line["name"], None)
        case _:
            pass  # a kind added by a later version of the same schema
