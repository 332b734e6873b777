"""Decoding in a child process, for formats whose decoders are not safe by construction.

A decoder is safe by construction if it writes into a buffer of the size that was checked before, as those of raw,
deflate, LZW or zstd pieces do. HDF5, Blosc, JPEG 2000 and others believe what the data says: they may ask for any
amount of memory, never end, or crash. They run in `sandbox_child.py` with a limit on address space, and with a limit
on time that is kept here. What goes wrong in there is an `InputError` here, and costs nothing but that child.

    parent   one line of JSON per request on the child's stdin
    child    one line of JSON on its stdout, followed by `nbytes` raw bytes

Nothing is pickled. A child serves one request at a time and is kept for the next one; so many children are started
as threads read at once. A child ends when its stdin is closed, so also when this process is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.files import as_path, is_remote, split_inner
from affmae_engine.data.readers.limits import sizes_trusted
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, Source, SourceInfo, reading
from affmae_engine.errors import AffmaeError, InputError, ResourceError

OPEN_SECONDS = 60.0
READ_SECONDS = 60.0
SECONDS_PER_BYTE = 1 / (2 << 20)
"""On top of `READ_SECONDS`, for what is decoded and returned."""
REMOTE_SECONDS = 600.0
"""For data that comes over a network, where retries take their time."""

_COMMAND = (sys.executable, "-P", "-m", "affmae_engine.data.readers.sandbox_child")
# Address space is what is limited, so each thread must not reserve 64 MiB of it for its own allocations, and zarr must
# not decode any number of chunks at a time.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
    "ZARR_ASYNC__CONCURRENCY": "8", "ZARR_THREADING__MAX_WORKERS": "2",
}  # fmt: skip
_ROOT = str(Path(__file__).resolve().parents[3])  # the child imports the same packages as this process
_CAUSES = {"FileNotFoundError": FileNotFoundError, "PermissionError": PermissionError}


class Isolated(Source):
    """A source whose reads are done by a child process.

    Args:
        info: as the reader described it.
        index: its number among the sources of the file.
        file: what the child opens; `info.path` may be a packed file of it.
    """

    def __init__(
        self, info: SourceInfo, index: int, options: ReadOptions, file: Path, *, piece_bytes: int, parallel: bool = True
    ) -> None:
        super().__init__(info)
        self.piece_bytes, self.parallel = piece_bytes, parallel
        self._file, self._index, self._options = _absolute(file), index, options

    def _open(self) -> Any:
        return True  # the child opens it

    def _close(self, handle: Any) -> None:
        pass

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        shape = (z[1] - z[0], y[1] - y[0], x[1] - x[0])
        block = np.empty(shape, self.info.dtype)
        if block.size == 0:
            return block
        wanted = {"do": "read", "index": self._index, "options": asdict(self._options), "z": z, "y": y, "x": x}
        seconds = READ_SECONDS + (self.piece_bytes + block.nbytes) * SECONDS_PER_BYTE
        _, data = _ask(wanted, self._file, seconds, self.info.path)
        if len(data) != block.nbytes:
            raise Refused(f"its decoder returned {len(data)} bytes in place of {block.nbytes}")
        return np.frombuffer(data, self.info.dtype).reshape(shape)


def scan_isolated(path: Path, options: ReadOptions) -> Found:
    """What `scan_sources` of a file finds, opened by a child process.

    Raises:
        InputError: nothing in it can be read.
    """
    file = split_inner(path)[0]
    with reading(path):
        answer, _ = _ask({"do": "scan", "options": asdict(options)}, _absolute(path), OPEN_SECONDS, path)
    sources: list[Source] = []
    for index, described in enumerate(answer["sources"]):
        # The child has another working directory: there, paths are absolute.
        named = described["path"].replace(str(_absolute(file)), str(file), 1)
        info = _info({**described, "path": named})
        sources.append(Isolated(info, index, options, path, piece_bytes=described["piece_bytes"]))
    return sources, [InputError(_as_named(message, path, path), hint) for message, hint in answer["refused"]]


def describe(source: Source) -> dict[str, Any]:
    """A source's facts as JSON values; `_info` is the way back."""
    facts = {**vars(source.info), "path": str(source.info.path), "dtype": source.info.dtype.str}
    return {**facts, "piece_bytes": source.piece_bytes}


def _info(described: dict[str, Any]) -> SourceInfo:
    facts: dict[str, Any] = {key: value for key, value in described.items() if key != "piece_bytes"}
    for key in ("shape_ZYX", "pixel_nm", "notes", "section_shape", "questions"):
        facts[key] = tuple(facts[key])
    return SourceInfo(**{**facts, "path": as_path(str(facts["path"])), "dtype": np.dtype(facts["dtype"])})


def _absolute(path: Path) -> Path:
    return path if is_remote(path) else Path(os.path.abspath(path))  # noqa: PTH100 (links stay what they are)


def _as_named(message: str, path: Path, named: Path) -> str:
    """A message of the child with the path as the user gave it."""
    for one, other in ((path, named), (split_inner(path)[0], split_inner(named)[0])):
        message = message.replace(str(_absolute(one)), str(other))
    return message


def _ask(request: dict[str, Any], file: Path, seconds: float, named: Path) -> tuple[dict[str, Any], bytearray]:
    """Answer and bytes of a child to one request about a file; errors call it `named`.

    Raises:
        Refused: the child crashed, took too long, or asked for too much memory.
        AffmaeError: what reading raised in the child.
    """
    limit = REMOTE_SECONDS if is_remote(file) else seconds
    child = _POOL.take()
    try:
        answer, data = child.ask({**request, "path": str(file), "trust_sizes": sizes_trusted()}, limit)
    except BaseException as error:  # whatever interrupts the exchange, the next answer would be that to this request
        child.end()
        if isinstance(error, ResourceError):
            raise ResourceError(f"cannot read {named}: {error.message}", error.hint) from error
        raise
    _POOL.give_back(child)
    if "error" not in answer:
        return answer, data
    message, hint = (_as_named(str(answer[key]), file, named) for key in ("message", "hint"))
    kind: type[AffmaeError] = ResourceError if answer["error"] == "ResourceError" else InputError
    cause = _CAUSES.get(answer["cause"])
    raise kind(message, hint) from (cause(message) if cause else None)


class _Child:
    def __init__(self) -> None:
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
        )  # fmt: skip

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytearray]:
        """Send one request and wait for its answer at most `seconds`."""
        assert self.process.stdin is not None
        deadline = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it died: `_receive` tells how
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        head = bytearray()
        while not head.endswith(b"\n"):
            head += self._receive(1, deadline, seconds)
        answer: dict[str, Any] = json.loads(head)
        return answer, self._receive(answer["nbytes"], deadline, seconds)

    def _receive(self, count: int, deadline: float, seconds: float) -> bytearray:
        assert self.process.stdout is not None
        data = bytearray(count)
        view, done = memoryview(data), 0
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while done < count:
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                self.end()
                raise Refused(f"decoding took longer than {seconds:.0f} s", "is the file complete and undamaged?")
            got = os.readv(descriptor, [view[done:]])
            if not got:
                raise self._died()
            done += got
        return data

    def _died(self) -> Refused | ResourceError:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            hint = "free some memory, then run the same command again"
            return ResourceError("the process that decodes it was killed, probably for want of memory", hint)
        if code > 0:
            hint = f"see why: {' '.join(('python', *_COMMAND[1:]))}"
            return ResourceError(f"the process that decodes it ended with exit code {code}", hint)
        how = signal.Signals(-code).name
        return Refused(f"its decoder crashed ({how})", "the file is damaged; copy it again from its origin")

    def end(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close this process's ends of its pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class _Pool:
    """Children that wait for a request."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()
        self._most = max(2, os.cpu_count() or 1)

    def take(self) -> _Child:
        """An idle child, or a new one. One that died while it was idle is replaced."""
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.process.poll() is None:
                    return child
                child.forget()
        return _Child()

    def give_back(self, child: _Child) -> None:
        """Keep a child for the next request."""
        with self._lock:
            if len(self._idle) < self._most:
                self._idle.append(child)
                return
        child.end()

    def end(self) -> None:
        """End all children."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def forget(self) -> None:
        """After a fork, in the new process: its parent's children are not its own."""
        idle, self._idle, self._lock = self._idle, [], threading.Lock()
        for child in idle:
            child.forget()
            child.process.returncode = 0  # nothing to wait for


_POOL = _Pool()


def end_children() -> None:
    """End the children that wait; the next request starts new ones, with the environment of then."""
    _POOL.end()


atexit.register(end_children)
os.register_at_fork(after_in_child=_POOL.forget)
