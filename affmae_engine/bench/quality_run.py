"""Runs a quality comparison: measures speeds, turns budgets into steps, trains every part in fresh processes, one per
card at a time, and keeps what is finished.

After every part results.json is written anew, so an interrupted comparison goes on where it stopped: parts that are
done are taken over, parts that failed are tried again. Unusual: nothing is taken over from other settings, other data
or another card; that is an error, because equal time means nothing across machines.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from affmae_engine import atomic
from affmae_engine.bench.quality import MODELS, Lengths, Model, Part, PartResult, QualityPlan, Speed, Status
from affmae_engine.bench.quality_data import Parts
from affmae_engine.bench.quality_process import Process
from affmae_engine.bench.quality_worker import Job, Work, weights_of
from affmae_engine.config import Task
from affmae_engine.data.store import Store
from affmae_engine.errors import Interrupted
from affmae_engine.train.signals import StopRequest

Speeds = dict[tuple[str, Model, Task], Speed]

CALIBRATION_SHARE, SHORTEST_CALIBRATION_S, LONGEST_CALIBRATION_S = 0.1, 1.0, 10.0
"""After its start-up a calibration measures for a tenth of the budget, one second at least and ten at most."""

OVERHEAD_S = {"pretrain": 8.0, "finetune": 6.0}
"""Guess of what a part takes beside its steps (building, first data, scoring, saving) until parts have shown it."""
_POLL_S = 0.1


@dataclass
class Progress:
    """Where the comparison stands, for whoever draws it. running: {part name: (step, steps)}; results: by part."""

    stage: str = "calibration"
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    results: dict[Part, PartResult] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=dict)
    lengths: Lengths | None = None
    eta_s: float | None = None
    """Estimated seconds to the end; None until speeds are known."""
    expected_s: float | None = None
    """What the whole was estimated to take when it was planned, without parts that were taken over."""


@dataclass
class QualityRun:
    """One comparison in one folder.

    Args:
        plan: what to do.
        folder: of results, runs and logs.
        store, parts: see `quality_data`.
        slots: environment variables of each process that may run at the same time: one per card.
        commit: writes results.json from the progress; called after every change of a result.
        look: called about ten times a second.
        stop: read at the same pace.
        speeds, lengths, results: what an earlier attempt left.
    """

    plan: QualityPlan
    folder: Path
    store: Store
    parts: Parts
    slots: Sequence[Mapping[str, str]]
    commit: Callable[[Progress], None]
    look: Callable[[Progress], None]
    stop: StopRequest
    speeds: Speeds = field(default_factory=dict)
    lengths: Lengths | None = None
    results: dict[Part, PartResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = self.folder / "runs"
        self._lock = threading.RLock()
        self._processes: set[Process] = set()
        self._failure: BaseException | None = None
        self.progress = Progress(results={part: PartResult.of(part) for part in self.plan.parts()}, speeds=self.speeds)
        for part, result in self.results.items():
            if part in self.progress.results:
                self.progress.results[part] = result

    def run(self) -> Progress:
        """Everything that is not done yet.

        Raises:
            ConfigError: a budget is too short.
            Interrupted: stopped on request; what was finished is kept.
            ResourceError: results cannot be written.
        """
        for name in ("runs", "logs"):
            atomic.ensure_folder(self.folder / name)
        self.look(self.progress)
        pairs = [(size, model) for size in self.plan.sizes for model in MODELS]
        unknown = [work for pair in pairs for work in self._calibration(*pair)]
        self._pool(_dealt(unknown, len(self.slots)))
        self.progress.lengths = self.plan.lengths(self.speeds, earlier=self.lengths)
        self._fail_unfit()
        todo = [chain for chain in (self._unfinished(chain) for chain in self.plan.chains()) if chain]
        self.progress.stage = "training"
        self.progress.expected_s = self.progress.eta_s = self._remaining(todo)
        self._commit()
        self._pool([self._jobs_of(chain) for chain in todo])
        self.progress.stage, self.progress.eta_s = "done", 0.0
        self._commit()
        return self.progress

    def _calibration(self, size: str, model: Model) -> list[Work]:
        """Work that measures the speeds that are not known yet."""
        seed, fraction = self.plan.seeds[0], self.plan.fractions[-1]
        found = []
        for part, budget_s in (
            (Part(size, model, seed), self.plan.budget_s),
            (Part(size, model, seed, "scratch", fraction), self.plan.finetune_budget_s),
        ):
            if (size, model, part.stage) in self.speeds:
                continue
            seconds = min(LONGEST_CALIBRATION_S, max(SHORTEST_CALIBRATION_S, CALIBRATION_SHARE * budget_s))
            found.append(Work(part, self.plan.config_of(part, 1).model_dump(mode="json"), seconds))
        return found

    def _jobs_of(self, chain: Sequence[Part]) -> list[Work]:
        assert self.progress.lengths is not None
        work = []
        for part in chain:
            lengths = self.progress.lengths
            steps = lengths.pretrain[part.size, part.model] if part.stage == "pretrain" else lengths.finetune[part.size]
            micro = self.speeds[part.size, part.model, part.stage].micro_batch
            work.append(Work(part, self.plan.config_of(part, steps, micro).model_dump(mode="json")))
        return work

    def _unfinished(self, chain: Sequence[Part]) -> list[Part]:
        """Parts to train. Weights that are gone and still needed are trained again."""
        results = self.progress.results
        open_ = [part for part in chain if results[part].status != "ok"]
        fit = [part for part in open_ if self.speeds[part.size, part.model, part.stage].step_s is not None]
        first = chain[0]
        needed = any(part.init == "pretrained" for part in fit)
        can = self.speeds[first.size, first.model, "pretrain"].step_s is not None
        if needed and can and first not in fit and not weights_of(first, self.runs).is_file():
            return [first, *fit]
        return fit

    def _fail_unfit(self) -> None:
        """What cannot be trained at all is a result at once."""
        for part, result in self.progress.results.items():
            speed = self.speeds[part.size, part.model, part.stage]
            if speed.step_s is None and result.status != "ok":
                result.status, result.note = speed.status, speed.note

    def _pool(self, queued: Sequence[list[Work]]) -> None:
        """Do lists of work, each in a process of its own, as many at once as there are slots."""
        waiting: queue.SimpleQueue[list[Work]] = queue.SimpleQueue()
        for work in queued:
            waiting.put(work)
        threads = [threading.Thread(target=self._serve, args=(slot, waiting)) for slot in self.slots[: len(queued)]]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                if self._ending():
                    self._end_processes()
                with self._lock:
                    self._count_down(queued)
                    self.look(self.progress)
                time.sleep(_POLL_S)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            while any(thread.is_alive() for thread in threads):
                self._end_processes()
                time.sleep(_POLL_S)
        if self._failure is not None:
            raise self._failure
        if self.stop.requested:
            raise Interrupted(
                f"by {self.stop.reason}; finished parts are kept in {self.folder}",
                "the same command goes on where it stopped",
                signal_number=self.stop.signal_number or 2,
            )

    def _serve(self, slot: Mapping[str, str], waiting: queue.SimpleQueue[list[Work]]) -> None:
        """Take work until none is left, or the comparison ends."""
        try:
            while not self._ending():
                try:
                    work = waiting.get_nowait()
                except queue.Empty:
                    return
                while work and not self._ending():
                    work = self._attempt(work, slot)
        except BaseException as error:
            self._failure = self._failure or error

    def _attempt(self, work: list[Work], slot: Mapping[str, str]) -> list[Work]:
        """One process for the work; returns what it left undone. One that dies costs the part it was at, one that gives
        up costs nothing."""
        job = Job(str(self.store.path), str(self.runs), self.plan.test_fraction, tuple(work))
        log = self.folder / "logs" / f"{'calibration-' if work[0].calibrate_s else ''}{work[0].part.name}.log"
        process = Process(job, slot, log)
        with self._registered(process):
            for message in process.messages():
                self._take(message, {entry.part.name: entry.part for entry in work})
        if self._ending():
            return []
        left = [entry for entry in work if entry.part.name not in process.ended]
        if left and not process.gave_up:
            victims = left if not process.ready else left[:1]
            for victim in victims:
                self._record_death(victim, process.death())
            left = left[len(victims) :]
        return left

    def _take(self, message: dict[str, Any], parts: Mapping[str, Part]) -> None:
        with self._lock:
            running = self.progress.running
            if message["event"] == "began":
                running[message["name"]] = (0, 0)
                self._mark(parts[message["name"]], "running")
            elif message["event"] == "step":
                running[message["name"]] = (message["step"], message["total"])
            elif message["event"] == "ended":
                part = parts[message["name"]]
                running.pop(message["name"], None)
                if "speed" in message:
                    self.speeds[part.size, part.model, part.stage] = Speed(**message["speed"])
                    self._mark(part, "waiting")
                else:
                    self.progress.results[part] = PartResult(**message["result"])
                    self._commit()

    def _mark(self, part: Part, status: Status) -> None:
        """Note where a part is, unless it is finished: weights that are gone are made again for the others' sake."""
        if self.progress.results[part].status != "ok":
            self.progress.results[part].status = status

    def _record_death(self, work: Work, reason: str) -> None:
        part = work.part
        with self._lock:
            self.progress.running.pop(part.name, None)
            if work.calibrate_s is not None:
                self.speeds[part.size, part.model, part.stage] = Speed(None, status="failed", note=reason)
                return
            result = self.progress.results[part]
            result.status, result.note = "failed", reason
            self._commit()

    def _commit(self) -> None:
        with self._lock:
            self.commit(self.progress)

    def _count_down(self, queued: Sequence[list[Work]]) -> None:
        if self.progress.stage == "training":
            self.progress.eta_s = self._remaining([[entry.part for entry in work] for work in queued])

    def _remaining(self, chains: Sequence[Sequence[Part]]) -> float:
        """Seconds to the end: the longest chain, or all of them spread over the slots."""
        left = [
            sum(self._expected(part) for part in chain if self.progress.results[part].status in ("waiting", "running"))
            for chain in chains
        ]
        return max([*left, sum(left) / len(self.slots)], default=0.0)

    def _expected(self, part: Part) -> float:
        """Seconds that a part still takes."""
        lengths = self.progress.lengths
        assert lengths is not None
        steps = lengths.pretrain.get((part.size, part.model), 0)
        if part.stage == "finetune":
            steps = lengths.finetune.get(part.size, 0)
        speed = self.speeds[part.size, part.model, part.stage]
        done, _ = self.progress.running.get(part.name, (0, 0))
        alike = [
            result.seconds - (result.steps * (result.step_s or 0.0))
            for other, result in self.progress.results.items()
            if (other.model, other.stage) == (part.model, part.stage) and result.status == "ok" and result.seconds
        ]
        overhead = sum(alike) / len(alike) if alike else OVERHEAD_S[part.stage] + speed.startup_s
        return max(0, steps - done) * (speed.step_s or 0.0) + (overhead if done == 0 else overhead / 2)

    def _ending(self) -> bool:
        return self.stop.requested or self._failure is not None

    @contextlib.contextmanager
    def _registered(self, process: Process) -> Iterator[None]:
        with self._lock:
            self._processes.add(process)
        try:
            yield
        finally:
            process.end()
            with self._lock:
                self._processes.discard(process)

    def _end_processes(self) -> None:
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            process.end()


def _dealt(work: Sequence[Work], hands: int) -> list[list[Work]]:
    """Work dealt out evenly, neighbours together."""
    each = -(-len(work) // hands) if work else 1
    return [list(work[i : i + each]) for i in range(0, len(work), each)]


def speeds_to_json(speeds: Speeds) -> list[dict[str, Any]]:
    """For results.json."""
    return [{"size": s, "model": m, "task": task, **asdict(speed)} for (s, m, task), speed in sorted(speeds.items())]


def speeds_from_json(records: Sequence[Mapping[str, Any]]) -> Speeds:
    """What `speeds_to_json` made; models that could not be trained are left out, to be tried again."""
    found = [dict(record) for record in records]
    return {(r.pop("size"), r.pop("model"), r.pop("task")): Speed(**r) for r in found if r["step_s"] is not None}
