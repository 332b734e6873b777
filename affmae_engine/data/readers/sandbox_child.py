"""The child process of `sandbox.py`: opens and reads files with limits on its own memory.

The limit on address space is set anew for each request: what the process has, a reserve, and several times what the
metadata of the file declares. A decoder that asks for more gets a MemoryError, or crashes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from affmae_engine.data.readers import limits
from affmae_engine.data.readers.files import as_path, is_remote, split_inner
from affmae_engine.data.readers.sandbox import describe
from affmae_engine.data.readers.source import ReadOptions, Refused, Source, reading
from affmae_engine.errors import AffmaeError, InputError, human_bytes

_RESERVE_TO_OPEN = 512 << 20  # libraries are imported and start their threads
_RESERVE_TO_READ = 192 << 20
_PIECES_AT_ONCE = 16  # zarr and tensorstore decode several chunks in parallel
_MOST_OPEN = 16


@dataclass(frozen=True)
class _Opened:
    """What a file holds; `state` tells whether it is still the same file."""

    file: Path
    state: list[int]
    sources: list[Source]
    refused: list[InputError]

    def close(self) -> None:
        """Release handles and decoded pictures; reading again opens them."""
        for source in self.sources:
            source.close()


Files = OrderedDict[str, _Opened]


def main() -> None:
    """Serve requests until stdin ends."""
    # Libraries may print; the answers' descriptor is theirs no more.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    opened: Files = OrderedDict()
    for line in sys.stdin.buffer:
        block: np.ndarray | None = None
        try:
            answer, block = _serve(json.loads(line), opened)
        except AffmaeError as error:
            kind = "InputError" if isinstance(error, InputError) else "ResourceError"
            cause = type(error.__cause__).__name__
            answer = {"error": kind, "message": error.message, "hint": error.hint, "cause": cause}
        try:
            _send(answers, answer, block)
        except BrokenPipeError:
            return


def _send(answers: BinaryIO, answer: dict[str, Any], block: np.ndarray | None) -> None:
    nbytes = block.nbytes if block is not None else 0
    answers.write(json.dumps({**answer, "nbytes": nbytes}).encode() + b"\n")
    if block is not None:
        answers.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    answers.flush()


def _serve(request: dict[str, Any], opened: Files) -> tuple[dict[str, Any], np.ndarray | None]:
    path, options = as_path(request["path"]), ReadOptions(**request["options"])
    os.environ[limits.VARIABLE] = "1" if request["trust_sizes"] else "0"
    with reading(path), _limited(_RESERVE_TO_OPEN):
        file = _open(path, options, opened)
    if request["do"] == "scan":
        told = [(error.message, error.hint) for error in file.refused]
        return {"sources": [describe(source) for source in file.sources], "refused": told}, None
    if request["index"] >= len(file.sources):
        raise InputError(f"cannot read {path}: it holds fewer images than before", "was it changed just now?")
    source = file.sources[request["index"]]
    z, y, x = (slice(*request[axis]) for axis in "zyx")
    nbytes = (z.stop - z.start) * (y.stop - y.start) * (x.stop - x.start) * source.info.dtype.itemsize
    # The first chunk that tensorstore reads starts its threads.
    reserve = _RESERVE_TO_OPEN if source.info.format in ("N5", "precomputed") or is_remote(path) else _RESERVE_TO_READ
    with reading(path, source.info.series), _limited(reserve + _PIECES_AT_ONCE * source.piece_bytes + 3 * nbytes):
        return {}, source.read(z, y, x)


def _open(path: Path, options: ReadOptions, opened: Files) -> _Opened:
    """The sources of a file, kept open for the next request as long as the file stays the same."""
    from affmae_engine.data.readers import scan_here

    state: list[int] = []
    file = split_inner(path)[0]
    if not is_remote(path):
        with contextlib.suppress(OSError):  # whoever opens it says what is wrong
            status = file.stat()
            state = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    key = json.dumps([str(path), options.channel, options.labels, options.axes, limits.sizes_trusted()])
    # All handles of a file that changed: HDF5 would go on using what it knows of it.
    for other in [other for other, one in opened.items() if one.file == file and one.state != state]:
        opened.pop(other).close()
    if key not in opened:
        for one in opened.values():  # whatever is still wanted of them is opened again
            one.close()
        opened[key] = _Opened(file, state, *scan_here(path, options))
        if len(opened) > _MOST_OPEN:
            opened.popitem(last=False)[1].close()
    opened.move_to_end(key)
    return opened[key]


@contextlib.contextmanager
def _limited(more: int) -> Iterator[None]:
    """Let the process grow by `more` bytes at most. Where address space cannot be limited (macOS), nothing is.

    Raises:
        Refused: what runs inside asked for more.
    """
    used = _address_space()
    if not used or limits.sizes_trusted():
        yield
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    except Exception as error:
        if not _out_of_memory(error):
            raise
        # It is no want of memory of this machine, so that is left out of the chain.
        raise Refused(
            f"decoding it takes more than {human_bytes(more)} of memory, far more than it declares",
            "it is damaged; if you know where it comes from, open it with --trust-sizes",
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _address_space() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
