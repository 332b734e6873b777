"""Running a prediction's blocks in this process, or handing them to others, and putting the output together.

In this process the network runs in the calling thread; blocks are read ahead and written in other threads. Memory: a
few blocks, whatever the size of the volume.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from affmae_engine.data.readers import Source
from affmae_engine.errors import BusyError, ConfigError, InputError, Interrupted, ResourceError
from affmae_engine.predict import outputs
from affmae_engine.predict.compute import WindowInput
from affmae_engine.predict.finish import Finished, PredictReport, finish, report, require_unchanged
from affmae_engine.predict.grid import share
from affmae_engine.predict.job import BlockResult, Job, PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.sources import files_of
from affmae_engine.predict.work import Work
from affmae_engine.runtime.signals import StopRequest

T = TypeVar("T")

READ_AHEAD = 2
"""Blocks that are read while one is computed."""
WRITE_BEHIND = 4
"""Blocks that are being written, at most."""
POLL_S = 0.1
"""How often a signal is looked for while there is nothing to compute."""


@dataclass(frozen=True)
class PredictProgress:
    """How far one input is, or the part of it that is this shard's; tiles count over all its sections."""

    name: str
    sections_done: int
    sections: int
    tiles_done: int
    tiles: int


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of the blocks."""

    index: int
    count: int


class Abandoned(Exception):
    """Blocks that were waited for will not be finished by this process."""


class Events(Protocol):
    """What is told, and asked, while blocks are computed."""

    def tiles(self, count: int, /) -> None:
        """So many tiles are done; raises when the work is to stop."""

    def block(self, number: int, /) -> None:
        """A block is finished; may be called from any thread."""

    def check(self) -> None:
        """Raises when the work is to stop."""


class Observer:
    """What whoever computes blocks tells, and asks.

    Args:
        job: the prediction.
        numbers: the blocks that this process is to see finished.
        done: those of them that are finished already.
        on_progress: called from the thread that computes.
        stop: a request to stop.
    """

    def __init__(
        self,
        job: Job,
        numbers: Sequence[int],
        done: set[int],
        on_progress: Callable[[PredictProgress], None],
        stop: StopRequest,
    ) -> None:
        self._job, self._on_progress, self._stop = job, on_progress, stop
        self._done, self._changed, self._abandoned = set(done), threading.Condition(), False
        self.follower: Future[Any] | None = None
        """What puts the output together meanwhile; where it fails, the work stops."""
        self._tiles, self._of_tiles = (sum(map(job.tiles_of, group)) for group in (done, numbers))
        self._voxels, self._of_voxels = (sum(job.find(n)[1].voxels for n in group) for group in (done, numbers))

    def tiles(self, count: int) -> None:
        """So many tiles are done; raises Interrupted when the work is to stop."""
        self._tiles += count
        self.tell()
        self.check()

    def block(self, number: int) -> None:
        """A block is finished; may be called from any thread."""
        with self._changed:
            self._done.add(number)
            self._voxels += self._job.find(number)[1].voxels
            self._changed.notify_all()

    def whole_block(self, number: int) -> None:
        """A block is finished whose tiles were not told of."""
        self._tiles += self._job.tiles_of(number)
        self.block(number)
        self.tell()

    def check(self) -> None:
        """Raises Interrupted when the work is to stop, or what ended the follower."""
        if self.follower is not None and self.follower.done() and (error := self.follower.exception()) is not None:
            raise error
        if self._stop.requested:
            done = f"{self._tiles} of {self._of_tiles} tiles"
            raise Interrupted(
                f"prediction of {self._job.source.info.name} was stopped at {done}; no output was written yet",
                "run the same command again to go on from there",
                signal_number=self._stop.signal_number or 2,
            )

    def wait(self, number: int) -> None:
        """Return when a block is finished; raises Abandoned when it never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or number in self._done)
            if number not in self._done:
                raise Abandoned

    def abandon(self) -> None:
        """Nothing more will be finished."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def abandoned(self) -> None:
        """Raises Abandoned when nothing more will be finished."""
        if self._abandoned:
            raise Abandoned

    def tell(self) -> None:
        """Pass on how far it is."""
        info = self._job.source.info
        sections = int(self._voxels * info.shape_ZYX[0] // max(1, self._of_voxels))
        self._on_progress(PredictProgress(info.name, sections, info.shape_ZYX[0], self._tiles, self._of_tiles))


class Engine(Protocol):
    """Computes blocks, telling an observer; returns when all are finished."""

    def __call__(self, job: Job, numbers: Sequence[int], observer: Observer, /) -> None: ...


def predict(
    source: Source,
    predictor: Predictor,
    targets: Outputs,
    options: PredictOptions,
    *,
    on_progress: Callable[[PredictProgress], None] = lambda _: None,
    stop: StopRequest | None = None,
    shard: Shard | None = None,
    engine: Engine | None = None,
    finish_only: bool = False,
) -> PredictReport | None:
    """Segment every section of `source` and write the labels.

    Args:
        targets: what to write; checked here again, just before the work.
        on_progress: called as tiles are done.
        stop: read after every batch, and on a CPU within one.
        shard: compute only this part of the blocks; other processes compute the rest. Whoever finds that all are
            finished puts the output together.
        engine: what computes the blocks; None computes them in this process.
        finish_only: compute nothing.

    Returns:
        None where other shards are not finished yet.

    Raises:
        InputError: the input is damaged, may not be read, or changed meanwhile (nothing is kept of it then alone).
        ConfigError: an output exists, touches an input, or is half done by another prediction; a TIFF in shards; blocks
            are missing; or --rescale lacks a pixel size.
        ResourceError: disk or memory; or the input cannot be read just now.
        BusyError: another process writes this output.
        Interrupted: stopped on request; finished blocks are kept for the next call.
    """
    if shard is not None and not targets.is_zarr:
        raise ConfigError(
            f"{targets.labels}: a TIFF is one file, which several processes cannot write",
            "name an OME-Zarr, -o NAME.zarr, for --shard",
        )
    outputs.check(targets, [*files_of(source), predictor.weights], overwrite=options.overwrite)
    work, stop = Work(targets.labels), stop or StopRequest()
    with work.locked(shared=shard is not None):
        if shard is None:
            outputs.sweep(targets)
        if finish_only and work.read_plan() is None:
            raise ConfigError(f"nothing to {targets.labels} is under way", "run the same command without --finish")
        began = time.perf_counter()
        job = Job.start(source, predictor, targets, options, alone=shard is None)
        outputs.check_space(job)
        mine = job.numbers if shard is None else share(len(job.numbers), shard.index, shard.count)
        done = job.finished(mine)
        if done:
            job.notes.append(f"{len(done)} of {len(mine)} blocks were finished before")
        observer = Observer(job, mine, done, on_progress, stop)
        observer.tell()
        pending = [] if finish_only else [number for number in mine if number not in done]
        try:
            if shard is not None or finish_only:
                (engine or in_process)(job, pending, observer)
                finished = _finish_shards(job, must=finish_only)
            else:
                finished = _compute_and_finish(job, pending, observer, engine or in_process)
        except InputError:
            with suppress(ResourceError):  # cannot be asked just now: nothing says that it changed
                require_unchanged(job)  # blocks of two images do not go together
            raise
        return None if finished is None else report(job, finished, time.perf_counter() - began, mine, len(done))


def in_process(job: Job, numbers: Sequence[int], observer: Events) -> None:
    """The engine that computes the blocks here."""
    left = deque(numbers)
    compute_blocks(job, lambda wait: left.popleft() if left else None, observer)


def compute_blocks(job: Job, take: Callable[[bool], int | None], observer: Events) -> None:
    """Compute blocks in this process until there are no more.

    Args:
        take: the next block. take(False): None where none is known yet; take(True): waits, None is the end.
    """

    def store(number: int, core_ZYX: np.ndarray | None, result: BlockResult) -> None:
        job.store(number, core_ZYX, result)
        observer.block(number)

    reads: deque[tuple[int, Future[WindowInput]]] = deque()
    writes: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(READ_AHEAD, "affmae-read") as readers,
        ThreadPoolExecutor(WRITE_BEHIND, "affmae-write") as writers,
        job.network.interruptible(observer.check),
    ):
        try:
            while True:
                while len(reads) < READ_AHEAD and (number := take(not reads)) is not None:
                    reads.append((number, readers.submit(job.read, number)))
                if not reads:
                    break
                number, reading = reads.popleft()
                window = _result(reading, observer)
                result = job.infer(number, window, observer.tiles)
                writes.append(writers.submit(store, number, window.core_ZYX, result))
                while writes and (writes[0].done() or len(writes) > WRITE_BEHIND):
                    _result(writes.popleft(), observer)
            for writing in writes:
                _result(writing, observer)
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise


def _result(future: Future[T], observer: Events) -> T:
    """The result of a future; signals are obeyed meanwhile."""
    while not wait([future], POLL_S).done:
        observer.check()
    return future.result()


def _compute_and_finish(job: Job, pending: Sequence[int], observer: Observer, engine: Engine) -> Finished:
    """Compute blocks, and put the output together in another thread that follows them."""
    with ThreadPoolExecutor(1, "affmae-finish") as pool:
        finishing = observer.follower = pool.submit(finish, job, observer.wait, observer.abandoned)
        try:
            engine(job, pending, observer)
            finished = _result(finishing, observer)
            observer.tell()
            return finished
        except BaseException as error:
            observer.abandon()
            wait([finishing])
            if isinstance(error, Interrupted) and finishing.exception() is None:  # it came too late
                return finishing.result()
            raise


def _finish_shards(job: Job, *, must: bool) -> Finished | None:
    """Put the output together when every block is finished; None where others still compute, or do that already."""
    if must:
        return finish(job)
    if not job.complete():
        require_unchanged(job)
        return None
    try:
        return finish(job)
    except BusyError:
        return None
