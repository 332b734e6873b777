"""All runs of a folder, one row each, without reading any of them whole: the beginning and the end of its events."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from affmae_cli.dashboard.sketch import sketch
from affmae_cli.dashboard.status import Life, Status, status_of
from affmae_engine.run_dir import RunDir, list_runs


@dataclass(frozen=True)
class RunRow:
    """One run in a table. last_time: of its last event, or when it was made, seconds since the epoch. best: held-out
    score of the best checkpoint as people read it: the loss of a pretraining (lower is better), else the score. NaN:
    not known."""

    root: Path
    task: str
    status: Status
    step: int
    total_steps: int
    loss: float
    best: float
    images_per_s: float
    last_time: float

    @property
    def name(self) -> str:
        """Of the run."""
        return self.root.name

    @property
    def age_s(self) -> float:
        """Seconds since its last event by now: the row of a run that ended is kept, and grows old all the same."""
        return max(0.0, time.time() - self.last_time)

    @property
    def live(self) -> bool:
        """Whether a trainer works on it, as far as can be told."""
        return not self.status.ended


class RunsFolder:
    """The runs directly under a folder. A row is made anew only when its events changed or its trainer may be alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int], RunRow]] = {}

    def rows(self) -> list[RunRow]:
        """Newest last event first."""
        known: dict[Path, tuple[tuple[int, int], RunRow]] = {}
        for run in list_runs(self.folder):
            stamp = _stamp(run.metrics)
            before = self._known.get(run.root)
            fresh = before is None or before[0] != stamp or before[1].live
            known[run.root] = (stamp, glance(run.root)) if fresh or before is None else before
        self._known = known
        return sorted((row for _, row in known.values()), key=lambda row: -row.last_time)


def glance(root: Path) -> RunRow:
    """What can be said of a run at once."""
    run, now = RunDir(root), time.time()
    holder = run.holder()  # before reading: a trainer writes its last event before it lets the lock go
    state = sketch(root, run.metrics, pieces=0)
    try:
        made = run.config.stat().st_mtime
    except OSError:
        made = now
    last, progress = (heard if math.isfinite(heard) else made for heard in (state.last_time, state.last_progress))
    silent_s, progress_s, age_s = (max(0.0, now - each) for each in (last, progress, made))
    where = f"process {holder.process} on {holder.host}" if holder.process is not None else ""
    life = Life(holder.state, silent_s, progress_s, age_s, where)
    environment, best = run.read_json(run.environment), run.read_json(run.best)
    task = state.task or str(environment.get("task", ""))
    value = best.get("value")
    score = float(value) if isinstance(value, float) else math.nan
    return RunRow(
        root=root,
        task=task,
        status=status_of(state, life),
        step=state.step,
        total_steps=state.total_steps,
        loss=state.latest.losses.get("loss", math.nan) if state.latest is not None else math.nan,
        best=-score if task == "pretrain" else score,
        images_per_s=state.latest.images_per_s if state.latest is not None else math.nan,
        last_time=last,
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
