"""An endless stream of micro-batches whose content depends on the step alone.

Position j of step s is sample `s * batch_size + j` of a dataset whose samples are pure functions of their index. So
the number of workers, the number of processes and a resumed run cannot change what is trained on.

Unusual: workers come from a fork server, a clean process without threads, CUDA or open files, because forking the
trainer itself can deadlock and shares file positions. A worker that dies (the kernel's out-of-memory killer) is
replaced together with its fellows and the stream goes on at the same micro-batch; the third death is an error. Faults
of a sample travel as records, not as exceptions, so that they keep their type, message and hint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from affmae_engine.errors import AffmaeError, ConfigError, InputError, ResourceError
from affmae_engine.runtime.signals import signals_blocked

TIMEOUT_S = 300.0
"""Seconds to wait for one micro-batch before the data source counts as hung."""

MAX_RESTARTS = 2
"""Times the workers are replaced after one of them died."""

PREFETCH = 2
"""Micro-batches that each worker prepares ahead."""

_POLL_S = 1.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC)

_log = logging.getLogger(__name__)


class Samples(Protocol):
    """Samples by index; picklable.

    May have `describe(index) -> str`, which names the image for error messages, and the two parts of `sample`:
    `raw(index)`, which reads, and `finish(batch)`, which computes samples from a batch of raw ones on any device.
    """

    def sample(self, index: int, /) -> dict[str, Tensor]:
        """Sample `index`, the same whenever it is asked for."""


def batches(
    dataset: Samples,
    *,
    first: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int | Literal["auto"] = "auto",
    timeout: float = TIMEOUT_S,
    raw: bool = False,
) -> Generator[dict[str, Tensor], None, None]:
    """Micro-batches of this rank from step `first` on, without end. Close the generator to end its workers.

    Args:
        dataset: the samples.
        first: step to begin with (0, or the step of the checkpoint that is resumed).
        batch_size: samples per step over all ranks; rank r takes positions [r, r + 1) * batch_size / world.
        micro_batch: samples per item of the stream; divides the rank's share.
        rank, world: this process and the number of processes.
        workers: data-loading processes; 0 loads in this process, `auto` see `worker_count`.
        timeout: seconds to wait for a worker before giving up.
        raw: leave `finish` to the caller, where the dataset has it; see `Samples`.

    Yields:
        dicts of stacked tensors [micro_batch, ...], in pinned memory where there is CUDA.

    Raises:
        ConfigError: the batch cannot be divided.
        InputError, CorruptError: a sample cannot be read; the message names its image.
        ResourceError: workers died repeatedly or hang, or memory is exhausted.
    """
    if batch_size % (world * micro_batch):
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided into micro-batches of {micro_batch} on {world} processes",
            "choose train.batch_size as a multiple of both",
        )
    plan = _Plan(batch_size, micro_batch, rank, world)
    return _stream(
        _MicroBatches(dataset, plan, raw=raw and hasattr(dataset, "raw")),
        first * plan.per_step,
        worker_count(workers),
        timeout,
    )


def worker_count(setting: int | Literal["auto"]) -> int:
    """Data-loading processes: as set, or up to 15 with one core left free, shared among the ranks of this machine."""
    if setting != "auto":
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, min(15, cores // ranks - 1))


def sample_error(error: Exception, what: str) -> AffmaeError:
    """The typed error for a sample that failed.

    Args:
        error: what was raised; one of ours keeps its class and hint.
        what: names the sample, for example "section 3 of image 'a'".
    """
    if isinstance(error, AffmaeError):
        return type(error)(f"{error.message} ({what})", error.hint)
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _EXHAUSTED):
        return ResourceError(f"cannot load {what}: {reason}", "use fewer data.workers or a smaller train.micro_batch")
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    return InputError(f"cannot load {what}: {reason}", "check that the dataset is readable; ingest it again if damaged")


@dataclass(frozen=True)
class _Plan:
    """Which samples make micro-batch k of this rank."""

    batch_size: int
    micro_batch: int
    rank: int
    world: int

    @property
    def per_step(self) -> int:
        return self.batch_size // (self.world * self.micro_batch)

    def indices(self, item: int) -> range:
        step, part = divmod(item, self.per_step)
        start = step * self.batch_size + self.rank * (self.batch_size // self.world) + part * self.micro_batch
        return range(start, start + self.micro_batch)


@dataclass(frozen=True)
class _Failure:
    """A sample that could not be made, on its way out of a worker."""

    error: AffmaeError
    trace: str


class _MicroBatches(Dataset):
    """Item k is a whole micro-batch, or the failure that stood in its way."""

    def __init__(self, samples: Samples, plan: _Plan, *, raw: bool) -> None:
        self.samples, self.plan, self.raw = samples, plan, raw

    def __getitem__(self, item: int) -> dict[str, Tensor] | _Failure:
        records = []
        read = getattr(self.samples, "raw") if self.raw else self.samples.sample  # noqa: B009
        try:
            for index in self.plan.indices(item):
                records.append(read(index))
            return {name: torch.stack([record[name] for record in records]) for name in records[0]}
        except Exception as error:
            what = self.describe(self.plan.indices(item)[min(len(records), self.plan.micro_batch - 1)])
            return _Failure(
                error if isinstance(error, AffmaeError) else sample_error(error, what), traceback.format_exc()
            )

    def describe(self, index: int) -> str:
        describe = getattr(self.samples, "describe", None)
        return f"sample {index}" + (f" ({describe(index)})" if describe else "")

    def sources(self, item: int) -> str:
        """The first samples of a micro-batch, for messages about all of it."""
        indices = self.plan.indices(item)
        return ", ".join(self.describe(index) for index in indices[:3]) + (", ..." if len(indices) > 3 else "")


class _From(Sampler[int]):
    """first, first + 1, ... without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        item = self.first
        while True:
            yield item
            item += 1


def _stream(items: _MicroBatches, first: int, workers: int, timeout: float) -> Generator[dict[str, Tensor], None, None]:
    item, restarts = first, 0
    while True:
        loader = iter(_loader(items, item, workers))
        try:
            while True:
                batch = _next(loader, timeout)
                if isinstance(batch, _Failure):
                    raise batch.error from _Cause(batch.trace)
                yield batch
                item += 1
        except (RuntimeError, OSError, EOFError) as error:
            # A connection that breaks (OSError, EOFError) is a worker that died while it handed data over.
            died = "exited unexpectedly" in str(error) or not isinstance(error, RuntimeError)
            if not died:
                _kill(loader)  # hung, so not in the middle of handing over data; it would not answer `_end`
            if workers == 0 or not died or restarts >= MAX_RESTARTS:
                raise _translated(error, died, items.sources(item), timeout) from error
            restarts += 1
            _log.warning("a data-loading process died; all of them are replaced (%d of %d)", restarts, MAX_RESTARTS)
        finally:
            _end(loader)


def _next(loader: Iterator[Any], timeout: float) -> Any:
    """The next item. Waits in short turns: dead workers are only noticed at the end of a turn."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return next(loader)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() > deadline:
                raise


def _loader(items: _MicroBatches, first: int, workers: int) -> DataLoader:
    pinned = torch.cuda.is_available()
    if workers == 0:
        return DataLoader(items, batch_size=None, sampler=_From(first), collate_fn=_as_is, pin_memory=pinned)
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server, so that a worker starts in milliseconds and shares that memory.
    context.set_forkserver_preload(["affmae_engine.data.dataset", "affmae_engine.data.segmentation"])
    resource_tracker.ensure_running()  # else the fork server starts it, which unblocks signals
    # A signal for the whole process group must not end the fork server, or its workers end before the step does.
    with _one_thread_each(), signals_blocked():
        forkserver.ensure_running()
    return DataLoader(
        items,
        batch_size=None,
        sampler=_From(first),
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        pin_memory=pinned,
        timeout=_POLL_S,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
    )


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """What starts inside computes with one thread: a linear algebra library of 16 in each of 8 workers would have them
    fight for the cores, and read its environment when it is imported, before a worker could say so."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_worker: int) -> None:
    """Signals for the whole process group are the trainer's business: it still needs data to finish its step.

    A trainer that is killed cannot end its workers, and PyTorch's own watch looks at the fork server, which lives as
    long as they do. So each watches the trainer itself.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with(trainer: Any) -> None:
    trainer.join()
    os._exit(1)


def _end(loader: Any) -> None:
    """End the workers of a loader's iterator now, including those that do not answer."""
    shutdown = getattr(loader, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()  # asks them first: one killed while it writes would leave the queue locked
    _kill(loader)


def _kill(loader: Any) -> None:
    for process in getattr(loader, "_workers", ()):
        if process.is_alive():
            process.kill()
            process.join(5)


def _translated(error: Exception, died: bool, sources: str, timeout: float) -> AffmaeError:
    text = str(error) or type(error).__name__
    if died:
        return ResourceError(
            f"data-loading processes died {MAX_RESTARTS + 1} times, last at {sources}",
            "memory or shared memory (/dev/shm) may be short: use fewer data.workers or a smaller train.micro_batch",
        )
    if "timed out" in text:
        return ResourceError(
            f"no data came within {timeout:g} s; waiting for {sources}",
            "check the disk or network share that holds the dataset",
        )
    return ResourceError(f"data loading failed at {sources}: {text.splitlines()[0]}")


class _Cause(Exception):
    """Carries the traceback of a worker, shown under AFFMAE_DEBUG=1."""
