"""Runs benchmark processes: one request, one fresh process, one measurement, whatever becomes of the process.

A process that crashes, is killed or takes too long gives a measurement that says so. The next process may be started
ahead: it loads torch while the one before it builds and compiles its network, and waits for its request.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

from pydantic import ValidationError

from affmae_engine.bench.case import Answer, Measurement, Request
from affmae_engine.errors import AffmaeError

COMMAND = (sys.executable, "-m", "affmae_engine.bench.worker")
_GRACE_S = 5.0


class Processes:
    """Answers requests, each in a process of its own. A context: leaving it ends what still runs.

    Args:
        timeout: seconds after which a process is given up.
        ahead: keep one process loaded for the next request; for machines with cores to spare.
    """

    def __init__(self, timeout: float, *, ahead: bool = False) -> None:
        self._timeout, self._ahead = timeout, ahead
        self._spare: subprocess.Popen[str] | None = None
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._closed = threading.Lock(), False

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            running, spare = list(self._running), self._spare
        for process in running:  # the threads that asked them read what they left
            process.kill()
        if spare is not None:
            spare.kill()
            spare.communicate()

    def ask(self, request: Request) -> Measurement:
        """The answer of a fresh process. May be called from several threads.

        Raises:
            AffmaeError: the request cannot be answered on this machine at all (no such device, unreadable dataset).
        """
        with self._next() as process:
            try:
                out, said = process.communicate(request.model_dump_json(), timeout=self._timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return Measurement(status="timed out", note=f"no answer within {self._timeout:g} s")
        try:
            answer = Answer.model_validate_json(out)
        except ValidationError:
            return _crashed(process.returncode, said)
        if answer.measurement is None:
            error = AffmaeError(answer.error, answer.hint)
            error.exit_code = answer.exit_code
            raise error
        return answer.measurement

    @contextlib.contextmanager
    def _next(self) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._closed:
                raise RuntimeError("no process is started any more")
            process, self._spare = self._spare or _start(), None
            self._running.add(process)
            if self._ahead:
                self._spare = _start()
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            with self._lock:
                self._running.discard(process)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _crashed(code: int, said: str) -> Measurement:
    """What a process that gave no answer left behind."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "it said nothing"
    if code < 0:
        short = "; the system does this when main memory runs out" if code == -signal.SIGKILL else ""
        return Measurement(status="failed", note=f"the process was ended by signal {-code}{short}; last line: {last}")
    return Measurement(status="failed", note=f"the process ended with exit code {code}: {last}")
