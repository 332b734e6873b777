"""Each operation with a fault at each of its calls, and the check of what is left (SQLite's anomaly loop)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import children
from tests.faults.calls import Fault, Kind, faulty
from tests.faults.operations import Operation

MODES: tuple[tuple[Kind, int], ...] = (
    ("kill", 0),
    ("once", errno.ENOSPC),
    ("for ever", errno.ENOSPC),
    ("once", errno.EIO),
    ("for ever", errno.EIO),
)
_NOT_REACHED = "fault-not-reached"


@dataclass(frozen=True)
class Verdict:
    """One fault that was tried; `problem` is empty when the operation kept its promise."""

    operation: str
    kind: Kind
    code: int
    call: int
    problem: str = ""

    def __str__(self) -> str:
        what = "killed" if self.kind == "kill" else f"{errno.errorcode[self.code]} {self.kind}"
        return f"{self.operation}, {what} at call {self.call}: {self.problem or 'well'}"


def every_fault(
    operation: Operation, root: Path, *, modes: tuple[tuple[Kind, int], ...] = MODES, stride: int = 1, first: int = 1
) -> Iterator[Verdict]:
    """Try every mode at calls `first`, `first + stride`, ... until the operation ends without reaching the fault."""
    folder, template, log = root / "work", root / "template", root / "log"
    folder.mkdir(parents=True)
    ready = children.run(lambda: operation.prepare(folder), log)
    if ready.code != 0:
        raise RuntimeError(f"{operation.name} cannot be prepared: {ready.text}")
    folder.rename(template)  # paths are part of what is written, so all work happens under one
    for kind, code in modes:
        call = first
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(template, folder)
            end = children.run(lambda fault=Fault(call, kind, code): _act(operation, folder, fault), log, seconds=30)
            if _NOT_REACHED in end.text:
                break
            yield Verdict(operation.name, kind, code, call, _problem(operation, folder, log, end, kind))
            call += stride


def _act(operation: Operation, folder: Path, fault: Fault) -> None:
    with faulty(fault, folder):
        try:
            operation.act(folder)
        finally:
            if fault.calls < fault.at:
                os.write(1, _NOT_REACHED.encode())  # pytest keeps what is printed to itself


def _problem(operation: Operation, folder: Path, log: Path, end: children.End, kind: Kind) -> str:
    if end.hung:
        return "hung"
    if kind != "kill" and not end.honest:
        return f"ended with {end.code} instead of an error of ours: {end.text[-400:]}"
    after = children.run(lambda: operation.check(folder), log, seconds=30)
    return "" if after.code == 0 else after.text[-400:]
