"""Blocks that are computed once, by any number of processes, and survive a kill.

    .NAME.objects/  made_from.json  seeds/000000.npz ...  seeds.npy  flood/000000.npz ...

Work is a sequence of passes. In a pass every block is computed by one function whose result depends on the inputs
alone, and committed as one file; a file that is there marks its block as done. Between passes the blocks' tables are
merged, which every process does for itself and with the same outcome. So a pass continues from what is there after a
kill, processes may compute the same block twice without harm, and several machines may share the folder: with
`shard` (i, n) a process computes every n-th block and waits for the others at the end of each pass.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from imagecodecs import zstd_decode, zstd_encode

from affmae_engine import atomic
from affmae_engine.errors import ConfigError, InputError, Interrupted
from affmae_engine.objects.blocks import Block, Shape, block_at, blocks
from affmae_engine.runtime.signals import StopRequest

BlockFunction = Callable[[Block], Mapping[str, np.ndarray]]
POLL_S = 0.5
"""Seconds between two looks for the blocks of other shards."""
CACHED_BLOCKS = 9
"""Decoded blocks that a process keeps."""


@dataclass(frozen=True)
class Job:
    """The folder of one run and how its blocks are computed.

    Attributes:
        folder: of intermediate results.
        volume, block: shapes of the volume and of a block, voxels.
        workers: processes; 1 computes in this one.
        shard: (i, n): this process computes the blocks i, i + n, ...
        stop: read after every block.
        on_progress: called with the name of the pass, finished and all blocks.
    """

    folder: Path
    volume: Shape
    block: Shape
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    stop: StopRequest = field(default_factory=StopRequest)
    on_progress: Callable[[str, int, int], None] = lambda _name, _done, _all: None

    @property
    def blocks(self) -> list[Block]:
        """All blocks of the volume."""
        return blocks(self.volume, self.block)

    def open(self, made_from: Mapping[str, Any], *, overwrite: bool) -> None:
        """Create the folder, or continue in the one that is there.

        Args:
            made_from: everything that the result depends on, plain JSON values.
            overwrite: intermediate results of another run give way instead of being refused.

        Raises:
            ConfigError: the folder has intermediate results made from something else.
            ResourceError: it cannot be written to.
        """
        wanted = json.loads(json.dumps(made_from))
        record = self.folder / "made_from.json"
        if self.folder.exists():
            before = _parsed(record)
            if before == wanted:
                return
            if before is not None:
                # Shards must not delete what another one has just begun.
                if not overwrite or self.shard[1] > 1:
                    differing = sorted(k for k in {*before, *wanted} if before.get(k) != wanted.get(k))
                    raise ConfigError(
                        f"{self.folder} has intermediate results with another {', '.join(differing).replace('_', ' ')}",
                        "repeat the command that was interrupted, or start again with --overwrite"
                        if self.shard[1] == 1
                        else "give all shards the same options; to start again, delete this folder",
                    )
                shutil.rmtree(self.folder)
        atomic.ensure_folder(self.folder)
        atomic.commit_json(record, wanted)

    def run(self, name: str, function: BlockFunction) -> Pass:
        """Compute all blocks of a pass that are not done yet, and wait for those of other shards.

        Args:
            function: can be pickled when there are several workers; returns arrays by name, tables and, as "voxels",
                unsigned integers of the block's shape, which are compressed.

        Raises:
            Interrupted: stopped on request; finished blocks are kept.
            InputError, ResourceError: from `function`, or the results cannot be written.
        """
        result = Pass(self.folder, name, self.volume, self.block)
        atomic.ensure_folder(result.folder)
        every = self.blocks
        done = sum(result.file(b.index).exists() for b in every)
        i, n = self.shard
        mine = [b for b in every if b.index % n == i and not result.file(b.index).exists()]
        self.on_progress(name, done, len(every))
        for finished, _ in enumerate(self.each(_Commit(result, function), mine), 1):
            self.on_progress(name, done + finished, len(every))
            self._check_stop(name)
        while n > 1 and not all(result.file(b.index).exists() for b in every):
            self._check_stop(name)
            time.sleep(POLL_S)
        return result

    def each(self, function: Callable[[Block], None], wanted: Sequence[Block]) -> Iterator[None]:
        """Call `function` for the blocks, in several processes where there are; yields after each one."""
        if self.workers == 1 or len(wanted) < 2:
            for block in wanted:
                function(block)
                yield
            return
        context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
        with ProcessPoolExecutor(min(self.workers, len(wanted)), context, _prepare_worker, (function,)) as pool:
            left = iter(wanted)
            # Few blocks are handed out ahead, so that a stop does not have to wait for many.
            running = {pool.submit(_in_worker, b) for _, b in zip(range(self.workers + 1), left, strict=False)}
            try:
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                        running |= {pool.submit(_in_worker, b) for _, b in zip(range(1), left, strict=False)}
                        yield
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def table(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Arrays that follow from finished passes; computed once and kept as NAME.npz, for workers and restarts."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            arrays = dict(compute())
            atomic.commit_file(path, lambda partial: _save(partial, arrays))
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def meet_shards(self) -> None:
        """Note that this shard is through with all passes; the first shard waits here for the others."""
        i, n = self.shard
        atomic.commit_bytes(self.folder / f"finished-{i}", b"")
        while i == 0 and not all((self.folder / f"finished-{k}").exists() for k in range(n)):
            self._check_stop("waiting for other shards")
            time.sleep(POLL_S)

    def discard(self) -> None:
        """Delete the intermediate results; the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_stop(self, name: str) -> None:
        if self.stop.requested:
            raise Interrupted(
                f"stopped in the pass {name!r}; finished blocks are kept",
                "run the same command again to continue",
                signal_number=self.stop.signal_number or signal.SIGINT,
            )


@dataclass(frozen=True)
class Pass:
    """The results of one pass."""

    root: Path
    name: str
    volume: Shape
    block: Shape

    @property
    def folder(self) -> Path:
        """Where the blocks are."""
        return self.root / self.name

    def file(self, index: int) -> Path:
        """The file of one block; complete where it exists."""
        return self.folder / f"{index:06d}.npz"

    def arrays(self, index: int, *names: str) -> tuple[np.ndarray, ...]:
        """Arrays of one block by name."""
        with np.load(self.file(index), allow_pickle=False) as file:
            return tuple(file[name] for name in names)

    def voxels(self, index: int) -> np.ndarray:
        """The voxels of one block; read-only, decoded once for repeated reads."""
        file = self.file(index)
        return _voxels(file, file.stat().st_mtime_ns)

    def read(self, z: slice, y: slice, x: slice, table: Callable[[int], np.ndarray] | None = None) -> np.ndarray:
        """A window of the whole volume.

        Args:
            table: for a block's index, the values that its voxel values are replaced with (index 0 for value 0).
        """
        window = (z, y, x)
        result: np.ndarray | None = None
        ranges = [range(s.start // b, -(-s.stop // b)) for s, b in zip(window, self.block, strict=True)]
        for cell in itertools.product(*ranges):
            block = block_at(self.volume, self.block, cell)
            low = [max(s.start, a) for s, a in zip(window, block.start, strict=True)]
            high = [min(s.stop, b) for s, b in zip(window, block.stop, strict=True)]
            inner = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, block.start, strict=True))
            outer = tuple(slice(a - s.start, b - s.start) for a, b, s in zip(low, high, window, strict=True))
            values = self.voxels(block.index)[inner]
            values = values if table is None else table(block.index)[values]
            if result is None:
                result = np.zeros([s.stop - s.start for s in window], values.dtype)
            result[outer] = values
        assert result is not None
        return result


@dataclass(frozen=True)
class _Commit:
    """Computes one block and commits its file."""

    result: Pass
    function: BlockFunction

    def __call__(self, block: Block) -> None:
        arrays = dict(self.function(block))
        if "voxels" in arrays:
            voxels = np.ascontiguousarray(arrays.pop("voxels"))
            arrays["voxels_zstd"] = np.frombuffer(zstd_encode(voxels.tobytes(), level=1), np.uint8)
            arrays["voxels_dtype"] = np.array(voxels.dtype.str)
            arrays["voxels_shape"] = np.array(voxels.shape)
        atomic.commit_file(self.result.file(block.index), lambda partial: _save(partial, arrays))


@lru_cache(maxsize=CACHED_BLOCKS)
def _voxels(file: Path, _written: int) -> np.ndarray:
    """The voxels in a file; its time of writing tells a later file of the same name apart."""
    with np.load(file, allow_pickle=False) as arrays:
        dtype, shape = np.dtype(str(arrays["voxels_dtype"])), arrays["voxels_shape"]
        return np.frombuffer(zstd_decode(arrays["voxels_zstd"].tobytes()), dtype).reshape(shape)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types its option allow_pickle into the arrays


_worker_function: Callable[[Block], None]
"""In a worker process: what it computes. Sent once, since its tables grow with the volume."""


def _in_worker(block: Block) -> None:
    _worker_function(block)


def _prepare_worker(function: Callable[[Block], None]) -> None:
    """A worker leaves signals to its parent, and ends with it even when that is killed."""
    global _worker_function
    _worker_function = function
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: it is damaged", "start again with --overwrite") from error
    return value if isinstance(value, dict) else None
