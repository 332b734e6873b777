"""The engine that hands blocks to one process per device of this machine.

The processes stay for all inputs of a command, so that each loads the model once. Blocks are handed out as processes
become free. A process that ends costs the blocks that it had begun, which others take over; a block that was lost three
times ends the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch

from affmae_engine import errors
from affmae_engine.errors import AffmaeError, ConfigError, ResourceError
from affmae_engine.predict.job import Job
from affmae_engine.predict.run import POLL_S, Observer

IN_HAND = 3
"""Blocks that a process has: one is read, one computed, one written."""
MOST_FAILURES = 3
_PATIENCE_S = 2.0


def gpu_indices(asked: str) -> list[int]:
    """The GPUs that `--gpus` means.

    Args:
        asked: a number or `all`.

    Raises:
        ConfigError: neither; or there are fewer, or none.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = present if asked == "all" else int(asked) if asked.isdigit() else 0
    if asked != "all" and count < 1:
        raise ConfigError(f"--gpus {asked}: give a number of GPUs, or all")
    if not present:
        raise ConfigError(f"--gpus {asked}: no GPU can be used here", "leave out --gpus to compute on the CPU")
    if count > present:
        raise ConfigError(f"--gpus {asked}: this machine has {present}", f"use --gpus {present} or --gpus all")
    return list(range(count))


class Workers:
    """Processes, one per device; an engine (`run.Engine`). Leaving the context ends them.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, one for each process; "" for the CPU.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = tuple(devices)
        self._processes = [_Process(device) for device in devices]

    @classmethod
    def on_gpus(cls, indices: Sequence[int]) -> Workers:
        """One process for each of these GPUs, as this process counts them."""
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return cls([visible[index] if visible else str(index) for index in indices])

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()
        self._processes = []

    def __call__(self, job: Job, numbers: Sequence[int], observer: Observer) -> None:
        """Compute the blocks; see `run.Engine`.

        Raises:
            ResourceError: all processes ended, or a block was lost three times.
            AffmaeError: what a process met.
        """
        alive = [process for process in self._processes if process.alive]
        missing = list((Counter(self._devices) - Counter(process.device for process in alive)).elements())
        self._processes = [*alive, *(_Process(device) for device in missing)]
        try:
            self._compute(job, numbers, observer)
        except BaseException:
            self.__exit__()  # what they are still at belongs to nobody
            raise

    def _compute(self, job: Job, numbers: Sequence[int], observer: Observer) -> None:
        left, failures = deque(numbers), Counter[int]()
        answers: queue.Queue[tuple[_Process, dict[str, Any] | None]] = queue.Queue()
        working = list(self._processes)
        for process in working:
            process.begin(job, answers)
        while working:
            for process in working:
                while left and not process.ended and len(process.blocks) < IN_HAND:
                    process.take(left.popleft())
                if not left and not process.blocks and not process.ended:
                    process.send(end=True)
                    process.ended = True
            observer.check()
            try:
                process, answer = answers.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if answer is None:  # it is gone
                reason = process.reason()  # waits for its end, so that it does not count as alive below
                lost = list(process.blocks)
                failures.update(lost)
                left.extendleft(reversed(lost))
                observer.tiles(-process.tiles)
                working = [each for each in working if each is not process]
                if lost:  # those that have ended already begin again
                    idle = [each for each in self._processes if each.alive and each not in working]
                    for each in idle:
                        each.begin(job, answers)
                    working += idle
                if not working or any(failures[number] >= MOST_FAILURES for number in lost):
                    raise ResourceError(
                        f"the process on {process.title} {reason}; finished blocks are kept",
                        "see to it, then run the same command again",
                    )
                job.warnings.append(f"the process on {process.title} {reason}: the others took over its blocks")
                continue
            if "error" in answer:
                raise _as_error(answer)
            if "tiles" in answer:
                process.tiles += answer["tiles"]
                observer.tiles(answer["tiles"])
            elif "block" in answer:
                number = answer["block"]
                process.blocks.remove(number)
                process.tiles -= job.tiles_of(number)
                observer.block(number)
            elif "end" in answer:
                job.warnings += [text for text in answer["end"] if text not in job.warnings]
                if left:  # lost by another one meanwhile
                    process.begin(job, answers)
                else:
                    working = [each for each in working if each is not process]


def _as_error(answer: dict[str, Any]) -> AffmaeError:
    """The error that a process met, as it would have been raised here."""
    kind = getattr(errors, answer["kind"] or "ResourceError", ResourceError)
    found: AffmaeError = kind(answer["error"], answer["hint"])
    return found


class _Process:
    """One of them. device: as given to `Workers`. blocks: that it has. tiles: that it told of, of unfinished blocks."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.title = f"GPU {device}" if device else "the CPU"
        self.blocks: list[int] = []
        self.tiles = 0
        self.ended = False
        self._answers: queue.Queue[tuple[_Process, dict[str, Any] | None]] | None = None
        self._child = subprocess.Popen(
            [sys.executable, "-m", "affmae_engine.predict.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
        )
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def begin(self, job: Job, answers: queue.Queue[tuple[_Process, dict[str, Any] | None]]) -> None:
        """Open a prediction. Answers go to the queue from now on."""
        self._answers, self.blocks, self.tiles, self.ended = answers, [], 0, False
        self.send(output=str(job.targets.labels.absolute()))

    def take(self, number: int) -> None:
        """Hand it a block."""
        self.blocks.append(number)
        self.send(block=number)

    def send(self, **message: Any) -> None:
        """Send a message; one that is gone says so by ending its output."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def reason(self) -> str:
        """How it ended, in words."""
        code = self._child.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with code {code}"

    def end(self) -> None:
        """End it; a block that is not finished is not marked, so nothing half-done counts."""
        self._child.terminate()
        try:
            self._child.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with contextlib.suppress(ValueError):  # what a library prints
                answer = json.loads(line)
                if isinstance(answer, dict) and self._answers is not None:
                    self._answers.put((self, answer))
        if self._answers is not None:
            self._answers.put((self, None))
