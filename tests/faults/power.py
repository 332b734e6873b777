"""Power cuts: what a disk may hold when nothing but synced data survives (as ALICE does for file systems).

While an operation runs, two things are remembered for every file and folder: what was in it when it was last synced.
Before each of its calls two disks are imagined: one where nothing unsynced survived, names included, and one where
every name survived but no content that was not synced. The operation's check is then put to each of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import children
from tests.faults.calls import Fault, faulty
from tests.faults.operations import Operation

Tree = dict[str, bytes | None]
"""Relative path to content; None is a folder."""


@dataclass
class _Disk(Fault):
    """Never strikes; watches what is synced."""

    root: Path = Path()
    contents: dict[int, bytes] = field(default_factory=dict)
    entries: dict[int, dict[str, int]] = field(default_factory=dict)
    imagined: list[Tree] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)
    times: dict[str, int] = field(default_factory=dict)
    """Modification times of what was there before: a prediction knows its image by it."""

    def begin(self) -> None:
        """What is there already is taken for synced."""
        for path in (self.root, *self.root.rglob("*")):
            self._sync(path)
            self.times[str(path.relative_to(self.root))] = path.stat().st_mtime_ns

    def strike(self, name: str, target: Any, half: Any = None) -> None:
        with self.lock:
            self.imagine()
            if name in ("fsync", "fdatasync"):
                self._sync(Path(f"/proc/self/fd/{target}").readlink())
            self.calls += 1

    def imagine(self) -> None:
        """Add the two disks of this moment, unless they were imagined before."""
        for tree in (self._synced(self.root, ""), self._named()):
            if tree not in self.imagined:
                self.imagined.append(tree)

    def _sync(self, path: Path) -> None:
        number = path.stat().st_ino
        # An inode that stays open is not given to another file.
        self.held.setdefault(number, os.open(path, os.O_RDONLY))
        if path.is_dir():
            self.entries[number] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self.contents[number] = path.read_bytes()

    def _synced(self, path: Path, name: str, number: int | None = None) -> Tree:
        number = path.stat().st_ino if number is None else number
        tree: Tree = {name: None} if name else {}
        for child, inode in self.entries.get(number, {}).items():
            where = f"{name}/{child}" if name else child
            if inode in self.entries:
                tree |= self._synced(path, where, inode)
            else:
                tree[where] = self.contents.get(inode, b"")
        return tree

    def _named(self) -> Tree:
        tree: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            with contextlib.suppress(FileNotFoundError):  # zarr's threads go on meanwhile
                tree[name] = None if path.is_dir() else self.contents.get(path.stat().st_ino, b"")
        return tree


def power_cuts(operation: Operation, root: Path) -> Iterator[str]:
    """Run the operation once and yield, for every disk that a power cut could leave, what is wrong with it ("" if
    nothing)."""
    folder, log = root / "work", root / "log"
    folder.mkdir(parents=True)
    operation.prepare(folder)
    disk = _Disk(at=1, root=folder)
    disk.begin()
    with faulty(disk, folder):
        operation.act(folder)
    disk.imagine()
    for descriptor in disk.held.values():
        os.close(descriptor)
    for tree in disk.imagined:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in tree.items():
            path = folder / name
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)
            if name in disk.times:
                os.utime(path, ns=(disk.times[name], disk.times[name]))
        end = children.run(lambda: operation.check(folder), log, seconds=30)
        yield "" if end.code == 0 else end.text[-400:]
