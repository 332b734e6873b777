"""Compares the families: every case once a round, each time in a fresh process, AFFMAE and ViT-MAE by turns.

First everything is compiled, several processes at once, so that no compiler runs while something is timed and the
rounds find their code ready. A case that fails in one round is not tried again; the others go on. What was measured
so far is at hand at any moment, so that an interrupted benchmark still has a report.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition

from affmae_engine.bench.batches import likely_gib
from affmae_engine.bench.case import Case, Measurement, Request
from affmae_engine.bench.largest import largest_that_fits
from affmae_engine.bench.processes import Processes
from affmae_engine.errors import Interrupted

LARGEST_TRIED = 4096
"""Images; more than any card holds of the smallest network."""
_GUESS_S = {"compile": 60.0, "round": 25.0, "largest": 240.0}
"""How long a process takes, until some have been seen."""


@dataclass(frozen=True)
class Settings:
    """How the cases are measured. Memory of the card in GiB, 0 without one."""

    rounds: int
    request: Request
    """A request whose case is replaced by each one's own."""
    compile_first: bool
    max_batch: bool
    memory_gib: float
    compilers: int = 4
    """Processes that compile at once."""


@dataclass
class Outcome:
    """A case and what is known of it so far. doing: what happens right now, in words."""

    case: Case
    rounds: list[Measurement] = field(default_factory=list)
    compiled: Measurement | None = None
    max_batch: int | None = None
    doing: str = "waiting"

    @property
    def last(self) -> Measurement | None:
        """The newest measurement."""
        return self.rounds[-1] if self.rounds else None

    @property
    def failed(self) -> bool:
        """Whether it is of no use to measure it again."""
        return self.last is not None and self.last.status != "ok"


class Clock:
    """Counts processes by phase and estimates how long the remaining ones take."""

    def __init__(self, planned: dict[str, int]) -> None:
        self.planned, self._seconds = dict(planned), {phase: list[float]() for phase in planned}
        self._started = time.monotonic()

    def took(self, phase: str, seconds: float) -> None:
        """One process of a phase has ended."""
        self._seconds[phase].append(seconds)

    def skip(self, phase: str) -> None:
        """One process of a phase will not be needed."""
        self.planned[phase] -= 1

    @property
    def done(self) -> int:
        """Processes that have ended."""
        return sum(map(len, self._seconds.values()))

    @property
    def total(self) -> int:
        """Processes in all."""
        return sum(self.planned.values())

    @property
    def elapsed_s(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float:
        """An estimate."""
        left = 0.0
        for phase, seen in self._seconds.items():
            each = statistics.fmean(seen) if seen else _GUESS_S[phase]
            left += each * max(0, self.planned[phase] - len(seen))
        return left


Observer = Callable[[Outcome], None]


class Comparison:
    """Outcomes of some cases, in their order, and the clock. `compile_all` and `measure` fill them in.

    Args:
        cases: in the order in which they take turns.
        settings: how they are measured.
        observe: told whenever an outcome has changed; may be called from several threads while compiling.
    """

    def __init__(self, cases: Sequence[Case], settings: Settings, observe: Observer = lambda outcome: None) -> None:
        self.outcomes = [Outcome(case) for case in cases]
        self.settings, self._observe = settings, observe
        self.clock = Clock(
            {
                "compile": len(self._to_compile()),
                "round": len(cases) * settings.rounds,
                "largest": len(cases) if settings.max_batch else 0,
            }
        )

    def compile_all(self, processes: Processes) -> None:
        """Compiles what will be measured, as many at once as the card's memory and the processors allow."""
        todo = self._to_compile()
        if not todo:
            return
        memory, workers = _Memory(0.9 * self.settings.memory_gib), max(1, self.settings.compilers)

        def compile_one(outcome: Outcome) -> None:
            with memory.lent(likely_gib(outcome.case)):
                began = time.monotonic()
                self._tell(outcome, "compiling")
                outcome.compiled = processes.ask(self._request(outcome.case, what="try"))
                # Several at once: each counts with its share of the time.
                self.clock.took("compile", (time.monotonic() - began) / min(workers, len(todo)))
                self._tell(outcome, "waiting")

        pool = ThreadPoolExecutor(workers)
        try:
            for future in [pool.submit(compile_one, outcome) for outcome in todo]:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def measure(self, processes: Processes) -> Iterator[Outcome]:
        """The rounds, then the largest batches where they are asked for; yields each outcome that has news.

        Raises:
            Interrupted: by Ctrl-C; says how far it was.
        """
        try:
            yield from self._measure(processes)
        except KeyboardInterrupt as error:
            raise Interrupted(f"after {self.clock.done} of {self.clock.total} measurements") from error

    def _measure(self, processes: Processes) -> Iterator[Outcome]:
        for number in range(self.settings.rounds):
            for outcome in self.outcomes:
                if outcome.failed:
                    self.clock.skip("round")
                    continue
                began = time.monotonic()
                self._tell(outcome, f"round {number + 1} of {self.settings.rounds}")
                first = number == 0  # the profile and the loader need no second look
                request = self._request(outcome.case)
                if not first:
                    request = request.model_copy(update={"profile": False, "data": None})
                outcome.rounds.append(processes.ask(request))
                self.clock.took("round", time.monotonic() - began)
                self._tell(outcome, "")
                yield outcome
        if self.settings.max_batch:
            for outcome in self.outcomes:
                self._find_largest(outcome, processes)
                yield outcome

    def _find_largest(self, outcome: Outcome, processes: Processes) -> None:
        began, case, known = time.monotonic(), outcome.case, outcome.last
        guess = case.batch
        if known is not None and known.allocated_gib:
            guess = int(0.92 * self.settings.memory_gib / known.allocated_gib * case.batch)

        def fits(batch: int) -> bool:
            self._tell(outcome, f"does a batch of {batch} fit?")
            request = self._request(case.model_copy(update={"batch": batch}), what="try")
            return processes.ask(request).status == "ok"

        outcome.max_batch = largest_that_fits(fits, guess, LARGEST_TRIED)
        self.clock.took("largest", time.monotonic() - began)
        self._tell(outcome, "")

    def _to_compile(self) -> list[Outcome]:
        return self.outcomes if self.settings.compile_first else []

    def _request(self, case: Case, **changes: str) -> Request:
        return self.settings.request.model_copy(update={"case": case, **changes})

    def _tell(self, outcome: Outcome, doing: str) -> None:
        outcome.doing = doing
        self._observe(outcome)


class _Memory:
    """Lends parts of the card's memory to threads."""

    def __init__(self, gib: float) -> None:
        self._all, self._free, self._changed = gib, gib, Condition()

    @contextlib.contextmanager
    def lent(self, gib: float) -> Iterator[None]:
        """Waits until that much is free and holds it; who asks for more than there is gets all of it."""
        gib = min(gib, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= gib)
            self._free -= gib
        try:
            yield
        finally:
            with self._changed:
                self._free += gib
                self._changed.notify_all()
