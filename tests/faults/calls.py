"""A fault at the nth call into the system, for every n: crash, full disk, failing device, once or for ever.

Inside `faulty` every call that changes a file system counts: opening for writing, write, truncate, fsync, rename,
unlink, mkdir, rmdir. At the nth one something happens. A write does half of its work first, as a torn one does. This
is SQLite's way of testing: n goes up until the work gets by without reaching it, and each time the state left behind
must be the old one or the new one.

Python's own calls are caught where they are made. safetensors writes in Rust, so its `save_file` counts as one call
that leaves half a file.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import safetensors.torch

Kind = Literal["kill", "once", "for ever"]


@dataclass
class Fault:
    """What happens at call number `at` (from 1): the process dies, or the call fails with `code`, once or always."""

    at: int
    kind: Kind = "kill"
    code: int = errno.ENOSPC
    calls: int = 0

    def strike(self, name: str, target: Any, half: Callable[[], object] = lambda: None) -> None:
        """Count a call about to be made; when its time has come, do `half` of it and then die or raise OSError.

        Args:
            name: of the call. target: its path or open file's number.
        """
        self.calls += 1
        if self.calls < self.at or (self.kind == "once" and self.calls > self.at):
            return
        with contextlib.suppress(OSError):
            half()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.code, os.strerror(self.code))


class _File:
    """A file open for writing whose calls are counted; everything else is the file's own."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._fault.strike("write", self._file.fileno(), half)
        return self._file.write(data)

    def truncate(self, *size: int) -> Any:
        self._fault.strike("ftruncate", self._file.fileno())
        return self._file.truncate(*size)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def faulty(fault: Fault, below: Path) -> Iterator[Fault]:
    """Count and strike calls of this process on paths in the folder `below`."""
    inside = f"{os.path.realpath(below)}/"

    def concerns(target: Any) -> bool:
        if isinstance(target, int):
            target = f"/proc/self/fd/{target}"
        return os.path.realpath(os.fsdecode(target)).startswith(inside)

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if concerns(target):
                fault.strike(name, target)
            return real(target, *arguments, **options)

        return call

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            writes = any(letter in mode for letter in "wax+") and not isinstance(target, int) and concerns(target)
            if not writes:
                return real(target, mode, *arguments, **options)
            fault.strike("open", target)
            return _File(real(target, mode, *arguments, **options), fault)

        return call

    def saving(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            def half() -> None:
                data = safetensors.torch.save(tensors)
                with real_open(path, "wb") as file:
                    file.write(data[: len(data) // 2])

            fault.strike("write", path, half)
            return real(tensors, path, *arguments, **options)

        return call

    real_open = io.open
    names = ("fsync", "fdatasync", "ftruncate", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")
    save = saving(safetensors.torch.save_file)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(os, name, counted(name, getattr(os, name))))
        for module in (io, builtins):
            stack.enter_context(mock.patch.object(module, "open", opening(real_open)))
        holders = [module for name, module in sys.modules.items() if name.startswith("affmae_engine")]
        for module in holders:
            if vars(module).get("save_file") is safetensors.torch.save_file:
                stack.enter_context(mock.patch.object(module, "save_file", save))
        yield fault
