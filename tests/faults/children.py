"""Forked children: work that may be killed, starved or hung at any moment, watched by a parent that is not.

A fork costs some 10 ms where a fresh interpreter with torch costs seconds, so thousands of runs are affordable.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from affmae_engine.errors import AffmaeError

FOREIGN = 99
"""Exit code of a child that ended with an exception which is not one of ours."""


@dataclass(frozen=True)
class End:
    """How a child ended: its exit code (negative: the signal), what it wrote, and whether it took too long."""

    code: int
    text: str
    hung: bool = False
    peak_kib: int = 0

    @property
    def honest(self) -> bool:
        """Whether it succeeded or failed with an error of ours."""
        return not self.hung and 0 <= self.code < FOREIGN


def start(work: Callable[[], object], log: Path, *, memory: int | None = None) -> int:
    """Fork a child that does `work`; returns its process id. Output and tracebacks go to `log`.

    Args:
        memory: bytes that the child may map beyond what it has from its parent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = FOREIGN
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if memory is not None:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
        work()
        code = 0
    except AffmaeError as error:
        code = error.exit_code
        os.write(2, f"{type(error).__name__}: {error.message}\n".encode(errors="backslashreplace"))
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def finish(child: int, log: Path, *, seconds: float = 120.0) -> End:
    """Wait for a child; one that takes longer than `seconds` is killed and counts as hung."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return End(-signal.SIGKILL, _text(log), hung=True)
        time.sleep(pause)
        pause = min(0.01, pause * 1.5)
    return End(os.waitstatus_to_exitcode(status), _text(log), peak_kib=usage.ru_maxrss)


def run(work: Callable[[], object], log: Path, *, seconds: float = 120.0, memory: int | None = None) -> End:
    """Do `work` in a child and wait for its end."""
    return finish(start(work, log, memory=memory), log, seconds=seconds)


def _text(log: Path) -> str:
    try:
        return log.read_text("utf-8", "replace")
    except OSError:
        return ""
