"""Checkpoints written in the background: training waits for the copy to host memory, not for the disk.

One thread writes, one checkpoint at a time. What becomes of it is told when the training asks; until then the last
complete checkpoint is the one before.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from affmae_engine import checkpoint
from affmae_engine.errors import ResourceError
from affmae_engine.run_dir import RunDir
from affmae_engine.train.state import Snapshot


@dataclass(frozen=True)
class Written:
    """What became of a checkpoint: its folder, or why there is none; warnings about old ones; seconds it took."""

    step: int
    outcome: Path | ResourceError
    warnings: tuple[str, ...]
    seconds: float


class Writer:
    """Writes the checkpoints of one run and deletes old ones.

    Args:
        run: the run.
        keep: newest checkpoints that stay, besides the best one.
    """

    def __init__(self, run: RunDir, keep: int) -> None:
        self._run, self._keep = run, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Written] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write. The one before must have been collected."""
        if self._pending is not None:
            raise RuntimeError("a checkpoint is being written already")
        self._pending = self._thread.submit(self._write, snapshot)

    def collect(self, *, wait: bool) -> Written | None:
        """What became of the last one, once; None when there is none or, unless `wait`, it is not done yet."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return None
        self._pending = None
        return pending.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot) -> Written:
        start, warnings = time.monotonic(), list[str]()
        outcome: Path | ResourceError
        try:
            outcome = snapshot.write(self._run)
            checkpoint.prune(self._run, self._keep, checkpoint.best_step(self._run), warnings.append)
        except ResourceError as error:
            outcome = error
        return Written(snapshot.metadata.step, outcome, tuple(warnings), time.monotonic() - start)
