"""SIGKILL at random moments: whatever is killed and called again ends with the bytes of what nobody disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import children
from tests.faults.workloads import Job, differences

KILLS_A_RUN = 12
"""After that many a run is left alone, so that it ends."""


@dataclass
class Tally:
    """What happened to one kind of job."""

    runs: int = 0
    kills: int = 0
    lost: list[str] = field(default_factory=list)
    """What was not as it should be; empty is the promise."""


def undisturbed(job: Job, root: Path) -> tuple[dict[str, bytes], float]:
    """The result of the job in a child that nobody kills, and how many seconds it took.

    Raises:
        RuntimeError: the job fails by itself.
    """
    folder = root / f"{job.name}-undisturbed"
    folder.mkdir()
    began = time.monotonic()
    end = children.run(lambda: job.call(folder), root / "log")
    if end.code != 0:
        raise RuntimeError(f"{job.name} fails without any fault: {end.text}")
    return job.result(folder), time.monotonic() - began


def killed_runs(job: Job, root: Path, chance: random.Random) -> Iterator[Tally]:
    """Run the job over and over, killing it at random moments; yields the tally after every kill and every run."""
    expected, seconds = undisturbed(job, root)
    tally = Tally()
    while True:
        folder, log = root / f"{job.name}-{tally.runs}", root / "log"
        folder.mkdir()
        for attempt in range(KILLS_A_RUN + 1):
            child = children.start(lambda folder=folder: job.call(folder), log)
            if attempt < KILLS_A_RUN:
                # Shorter and shorter: a run that comes far would otherwise end before the next kill.
                time.sleep(chance.uniform(0, seconds))
                if os.waitpid(child, os.WNOHANG)[0] == 0:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    tally.kills += 1
                    yield tally
                    continue
                break
            end = children.finish(child, log)
            if end.code != 0:
                tally.lost.append(f"{job.name}, run {tally.runs}: ended with {end.code}: {end.text[-500:]}")
        # A call on what is complete changes nothing and ends well.
        end = children.run(lambda folder=folder: job.call(folder), log)
        wrong = differences(job.result(folder), expected) if end.code == 0 else [f"exit code {end.code}: {end.text}"]
        if wrong:
            tally.lost.append(f"{job.name}, run {tally.runs}: {', '.join(wrong)[-800:]}")
        shutil.rmtree(folder)
        tally.runs += 1
        yield tally
