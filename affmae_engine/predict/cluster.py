"""The engine that submits blocks to a dask cluster, however that was started (extra `affmae[cluster]`).

Workers need affmae, and the folders of input, weights and output under the same paths. Each computes a block at a time;
where several workers share a machine with GPUs, each should see its own (dask-cuda, or a Slurm task per GPU).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from affmae_engine.errors import ConfigError, ResourceError, one_line
from affmae_engine.predict.job import Job
from affmae_engine.predict.run import POLL_S, Observer
from affmae_engine.predict.workers import MOST_FAILURES

CONNECT_S = 10
PER_THREAD = 2
"""Blocks that are submitted for each thread of the cluster."""

_one_at_a_time = threading.Lock()


@cache
def _job(output: str, key: str) -> Job:
    """A prediction as this worker sees it; opened once."""
    from affmae_engine.predict.worker import predictor_of

    return Job.open(Path(output), predictor_of)


def compute_block(output: str, key: str, number: int) -> list[str]:
    """Compute a block on a worker, unless it is finished. Returns warnings.

    Args:
        output, key: of the prediction.
        number: of the block.
    """
    with _one_at_a_time:
        job = _job(output, key)
        if not job.finished([number]):
            job.compute(number)
        return job.warnings


class Cluster:
    """A dask cluster; an engine (`run.Engine`).

    Args:
        address: of its scheduler, or a scheduler file.

    Raises:
        ConfigError: dask is not installed.
        ResourceError: no scheduler answers there.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise ConfigError(
                "--dask needs dask.distributed", "install it: pip install 'affmae[cluster]', here and on the workers"
            ) from error
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        try:
            self._client: Any = Client(**where, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ResourceError(
                f"no dask scheduler answers at {address}: {one_line(error)}", "is it running, and the address right?"
            ) from error

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def __call__(self, job: Job, numbers: Sequence[int], observer: Observer) -> None:
        """Compute the blocks; see `run.Engine`.

        Raises:
            ResourceError: a block failed three times; with its reason.
        """
        from distributed import wait

        left, failures = deque(numbers), Counter[int]()
        output = str(job.targets.labels.absolute())
        running: dict[Any, int] = {}
        try:
            while left or running:
                observer.check()
                room = PER_THREAD * max(1, sum(self._client.nthreads().values()))
                while left and len(running) < room:
                    number = left.popleft()
                    name = f"{job.key[:12]}-{number}-{failures[number]}"
                    running[self._client.submit(compute_block, output, job.key, number, key=name, pure=False)] = number
                try:
                    with self._client.as_current():
                        done = wait(list(running), timeout=POLL_S, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    continue
                for task in done:
                    number = running.pop(task)
                    error = task.exception()
                    if error is None:
                        job.warnings += [text for text in task.result() if text not in job.warnings]
                        observer.whole_block(number)
                        continue
                    failures[number] += 1
                    if failures[number] >= MOST_FAILURES:
                        raise ResourceError(
                            f"block {number} failed {MOST_FAILURES} times: {one_line(error)}; finished blocks are kept",
                            "see to it, then run the same command again",
                        )
                    left.append(number)
        finally:
            if running:
                self._client.cancel(list(running))
