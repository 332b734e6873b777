"""The folder of a prediction under way: what is to be done, and which blocks are finished.

    .NAME.unfinished/  plan.json  blocks/00000017.json ...  lock  and the arrays that blocks are written to

It lies beside the output until that is complete. plan.json says what the blocks are computed from; a prediction that
differs in any of it is refused, because half of one and half of another is neither. A block's marker is written when
its files are on the device, and carries a hash of the plan; a block without one is computed again. Any number of
processes, on any number of machines, may work in the folder: no two write the same file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from affmae_engine import atomic
from affmae_engine.errors import BusyError, ConfigError, CorruptError

SCHEMA = 1
UNFINISHED = ".unfinished"
"""How the names of work folders end."""
_ABSENT = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""A file system that has no locks."""


def work_folder(output: Path) -> Path:
    """Where the prediction to `output` is under way."""
    return output.with_name(f".{atomic.short_stem(output.name)}{UNFINISHED}")


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Marker:
    """A finished block. counts: pixels of each class; none for a block of one of several orientations. batch: tiles
    of its forward passes, smaller than planned where memory ran out."""

    counts: tuple[int, ...]
    batch: int


@dataclass(frozen=True)
class Work:
    """The folder of one output. Constructing it touches nothing on disk."""

    output: Path

    @cached_property
    def folder(self) -> Path:
        """Hidden, beside the output."""
        return work_folder(self.output)

    @property
    def plan_file(self) -> Path:
        """plan.json."""
        return self.folder / "plan.json"

    @property
    def blocks(self) -> Path:
        """Folder of the markers."""
        return self.folder / "blocks"

    def read_plan(self) -> dict[str, Any] | None:
        """What is under way here; None where nothing is.

        Raises:
            CorruptError: the plan cannot be read.
        """
        try:
            plan = json.loads(self.plan_file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptError(f"{self.plan_file} cannot be read", "begin anew with --overwrite") from error
        if not isinstance(plan, dict) or plan.get("schema") != SCHEMA:
            raise CorruptError(f"{self.plan_file} is of another version of affmae", "begin anew with --overwrite")
        return plan

    def publish_plan(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Write the plan unless another process has written one; returns the one that holds."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"plan.{socket.gethostname()}.{os.getpid()}"
        atomic.commit_json(own, {"schema": SCHEMA, **plan})
        try:
            with atomic.translated_write_errors(self.plan_file), contextlib.suppress(FileExistsError):
                os.link(own, self.plan_file)  # unlike a rename, it never replaces
                atomic.fsync_folder(self.folder)
        finally:
            with contextlib.suppress(OSError):  # it goes with the folder
                own.unlink()
        found = self.read_plan()
        assert found is not None
        return found

    def refuse_other(self, made_from: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Raises ConfigError, which names what differs from `before`, what the unfinished blocks were made from."""
        keys = {*before, *made_from}
        differing = sorted(key for key in keys if before.get(key) != made_from.get(key))
        if differing:
            raise ConfigError(
                f"there is an unfinished prediction to {self.output} with another "
                f"{', '.join(differing).replace('_', ' ')}",
                "start it with the same model, image and options to complete it, or begin anew with --overwrite",
            )

    def marker(self, number: int, key: str) -> Marker | None:
        """The marker of a finished block; None where there is none that carries `key`."""
        try:
            values = json.loads(self._marker_file(number).read_text("utf-8"))
            if values["key"] != key:
                return None
            return Marker(tuple(int(n) for n in values["counts"]), int(values["batch"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def mark(self, number: int, key: str, marker: Marker) -> None:
        """Say that a block is finished; its files are on the device.

        Raises:
            ResourceError: the disk is full or failed.
        """
        values = {"key": key, "counts": list(marker.counts), "batch": marker.batch}
        atomic.commit_json(self._marker_file(number), values)

    def finished(self, key: str, numbers: Iterable[int]) -> set[int]:
        """Those of the blocks that are finished."""
        there = self._marked()
        return {number for number in numbers if number in there and self.marker(number, key) is not None}

    def marked(self, numbers: Iterable[int]) -> bool:
        """Whether all of the blocks have a marker, of whatever plan; no marker is read."""
        there = self._marked()
        return all(number in there for number in numbers)

    def discard(self) -> None:
        """Delete everything; the output is complete, or nothing of it can be used."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the folder: alone, or together with others that hold it `shared`. Leaving keeps what is in it.

        Raises:
            BusyError: another process holds it.
            ResourceError: the place cannot be written to.
        """
        with self._lock("lock", shared=shared) as held:
            if not held:
                raise BusyError(
                    f"{self.output} is being written by {self._holder() or 'another process'}",
                    "wait for it, or choose another -o/--out",
                )
            try:
                yield
            finally:
                if self.folder.is_dir() and not self.plan_file.exists():  # nothing was begun
                    self.discard()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Hold the right to put the output together; False where another process does it or has done it."""
        if not self.folder.is_dir():
            yield False
            return
        with self._lock("finish", shared=False) as held:
            yield held and self.plan_file.exists()

    @contextlib.contextmanager
    def _lock(self, name: str, *, shared: bool) -> Iterator[bool]:
        with atomic.translated_write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            file = (self.folder / name).open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
            with contextlib.suppress(OSError):  # only tells others who holds it; a full disk is reported elsewhere
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield True

    def _marked(self) -> set[int]:
        try:
            return {int(name[:-5]) for name in os.listdir(self.blocks) if name[:-5].isdigit()}  # noqa: PTH208
        except FileNotFoundError:
            return set()

    def _holder(self) -> str:
        try:
            return (self.folder / "lock").read_text("utf-8", "replace")[:200].strip()
        except OSError:
            return ""

    def _marker_file(self, number: int) -> Path:
        return self.blocks / f"{number:08d}.json"
