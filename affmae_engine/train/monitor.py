"""A thread beside the trainer: takes requests in control/ at once and samples the machine every few seconds.

It exists because the trainer may be busy for long: with a slow step, an evaluation, or the wait for a hung data source.
So a request is acknowledged within a second, and a viewer can tell a busy trainer from a dead one. It never waits for
the device, and a failure of its own ends it, not the training. The trainer meets a request after the step under way.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from affmae_engine.events import Event, SystemSampled
from affmae_engine.runtime.gpu_stats import GIB, Card

REQUESTS_EVERY_S = 0.5
SAMPLE_EVERY_S = 5.0
_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


class Monitor:
    """Works while its `with` block runs.

    Args:
        card: what to sample besides the host.
        step: the present step.
        emit: takes an event; called from this thread.
        take_requests: reads control/; called from this thread.
        folder: on the disk whose free space is sampled; None: none is.
        sample_every_s: seconds between two samples; the first comes at once.
    """

    def __init__(
        self,
        card: Card,
        *,
        step: Callable[[], int],
        emit: Callable[[Event], None],
        take_requests: Callable[[], None],
        folder: Path | None = None,
        sample_every_s: float = SAMPLE_EVERY_S,
    ) -> None:
        self._card, self._step, self._emit, self._take_requests = card, step, emit, take_requests
        self._folder, self._sample_every_s = folder, sample_every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(_PATIENCE_S)  # a hung network disk must not keep the run from ending
        self._card.close()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:
            _log.exception("the monitor of the machine failed; training goes on without it")

    def _watch(self) -> None:
        psutil.cpu_percent()  # the next call tells the load since this one
        sampled = time.monotonic() - self._sample_every_s
        while not self._done.wait(REQUESTS_EVERY_S):
            self._take_requests()
            if time.monotonic() - sampled >= self._sample_every_s:
                sampled = time.monotonic()
                figures = {**self._card.sample(), **host_sample(self._folder)}
                figures["other_gpus"] = [_rounded(other) for other in figures.get("other_gpus", ())]
                self._emit(SystemSampled(step=self._step(), **_rounded(figures)))


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in figures.items()}


def host_sample(folder: Path | None = None) -> dict[str, Any]:
    """Fields of a `system` event on this process, its machine and the disk of `folder`. The load is that since the last
    call."""
    found: dict[str, Any] = {"cpu": psutil.cpu_percent() / 100}
    with contextlib.suppress(psutil.Error, OSError):
        memory = psutil.virtual_memory()
        found |= {"host_memory_used": (memory.total - memory.available) / GIB, "host_memory_total": memory.total / GIB}
        found["process_memory"] = psutil.Process().memory_info().rss / GIB
    if folder is not None:
        with contextlib.suppress(OSError):
            found["disk_free"] = psutil.disk_usage(str(folder)).free / GIB
    return found
