"""The fault harness by hand: `python -m tests.faults --kills 1000 --seed 7 [--minutes 20]`, with a report at the end.

Everything that is not as it should be is printed when it happens, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.faults.every_call import every_fault
from tests.faults.kills import killed_runs
from tests.faults.mutations import SUBJECTS, mutants
from tests.faults.operations import OPERATIONS
from tests.faults.power import power_cuts
from tests.faults.workloads import Workloads


@dataclass
class Report:
    """What was tried, by name, and what was lost."""

    until: float
    rows: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        """Keep and print what went wrong; an empty text is none."""
        if problem:
            self.lost.append(problem)
            print(f"LOST  {problem}", flush=True)

    @property
    def time_is_up(self) -> bool:
        """Whether the minutes that were given are over."""
        return time.monotonic() > self.until


@dataclass(frozen=True)
class Doses:
    """How much of each: kills in all, mutants of each subject, and every how many-th call gets a fault (0: none)."""

    kills: int
    mutants: int
    stride: int


def harass(root: Path, doses: Doses, seed: int, minutes: float) -> Report:
    """Do all of it, or as much as fits into `minutes`, kills in the first half of them."""
    report = Report(time.monotonic() + 30 * minutes)
    _kill(root / "kills", doses.kills, random.Random(seed), report)
    report.until += 30 * minutes
    for operation in OPERATIONS if doses.stride else ():
        _strike(operation.name, root / "calls", doses.stride, report)
    for subject in SUBJECTS if doses.mutants else ():
        tried = refused = 0
        for mutant in mutants(subject, root / "mutants" / subject.name, random.Random(seed), count=doses.mutants):
            tried, refused = tried + 1, refused + mutant.refused
            report.note(mutant.problem and f"{mutant}")
            if report.time_is_up:
                break
        report.rows[f"damaged {subject.name}"] = f"{tried} mutants, {refused} refused"
    return report


def _kill(root: Path, kills: int, chance: random.Random, report: Report) -> None:
    if not kills:
        return
    root.mkdir()
    jobs = Workloads(root / "inputs").jobs()
    running: dict[str, Iterator] = {job.name: killed_runs(job, root, chance) for job in jobs}
    tallies = {name: next(stream) for name, stream in running.items()}
    while sum(tally.kills for tally in tallies.values()) < kills and not report.time_is_up:
        # The kind with the fewest kills comes next, so that a short run of the harness is a fair one.
        name = min(tallies, key=lambda name: tallies[name].kills)
        before = len(tallies[name].lost)
        tallies[name] = next(running[name])
        for problem in tallies[name].lost[before:]:
            report.note(problem)
    for name, tally in tallies.items():
        report.rows[f"killed {name}"] = f"{tally.kills} kills in {tally.runs} runs"


def _strike(name: str, root: Path, stride: int, report: Report) -> None:
    operation = next(one for one in OPERATIONS if one.name == name)
    if report.time_is_up:
        return
    tried = disks = 0
    for verdict in every_fault(operation, root / name, stride=stride):
        tried += 1
        report.note(verdict.problem and str(verdict))
        if report.time_is_up:
            break
    for problem in power_cuts(operation, root / f"{name}-power"):
        disks += 1
        report.note(problem and f"{name}, power cut {disks}: {problem}")
    report.rows[f"faults in {name}"] = f"{tried} calls struck, {disks} disks after a power cut"


def main() -> int:
    """Parse the options, run, print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all (200)")
    parser.add_argument("--mutants", type=int, default=200, help="damaged copies of each kind of file (200)")
    parser.add_argument("--stride", type=int, default=1, help="strike every n-th call; 0 strikes none (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end after so many minutes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="affmae-faults-"))
    began = time.monotonic()
    try:
        report = harass(root, Doses(asked.kills, asked.mutants, asked.stride), asked.seed, asked.minutes)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    width = max(map(len, report.rows), default=0)
    for name, what in report.rows.items():
        print(f"{name:<{width}}  {what}")
    seconds = time.monotonic() - began
    print(f"seed {asked.seed}, {seconds:.0f} s: {len(report.lost) or 'nothing'} lost")
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
