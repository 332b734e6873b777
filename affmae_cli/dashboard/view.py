"""What the screens know of a run at one moment: made by the reading thread, never changed, handed over in a message."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affmae_cli.dashboard.control import pending_requests
from affmae_cli.dashboard.plot import Trace
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.series import CAPACITY, Curve, Series
from affmae_cli.dashboard.status import Status
from affmae_cli.dashboard.verdicts import Verdict
from affmae_engine.config import RunConfig
from affmae_engine.events import Evaluated, Event, PreviewSaved, RunStarted, StepLogged, SystemSampled

POINTS = 2048
"""Points of a curve that are handed over: several for every column of a wide terminal."""
ENOUGH = 512
"""Points in a zoomed window below which the file is read again for more."""
_REST = 100
"""Curves that took t seconds to make are made again after so many t."""
_UNSEEN_S = 5.0
"""Curves of many points are made again after this long at the soonest: one point more is not seen."""
_SHORTEST_S = 1.0
Curves = Mapping[str, Curve]


@dataclass(frozen=True, eq=False)
class RunView:
    """One moment of a run. The events are the newest of their kind, None before there is one.

    now: seconds since 1970. opening: there is more to be read at once. drawable: it is all that was read, or the sketch
    of a long run that is being opened. elapsed_s, eta_s: of the whole run; NaN when not
    known. data_wait: share of the wall time. steps, held_out, systems: curves by the names that `RunState` gives them;
    revision: another one when they changed. detail: the steps of the part that is zoomed in on, empty when `steps`
    serves. recent: notable events, oldest first. requests: what the trainer was asked for and has not taken yet.
    """

    root: Path
    status: Status
    now: float
    opening: bool = False
    drawable: bool = True
    config: RunConfig | None = None
    started: RunStarted | None = None
    latest: StepLogged | None = None
    evaluated: Evaluated | None = None
    best: Evaluated | None = None
    system: SystemSampled | None = None
    task: str = ""
    step: int = 0
    total_steps: int = 0
    progress: float = 0.0
    elapsed_s: float = 0.0
    eta_s: float = math.nan
    data_wait: float = math.nan
    megapixels_per_s: float = math.nan
    on_cpu: bool = False
    verdicts: tuple[Verdict, ...] = ()
    recent: tuple[Event, ...] = ()
    previews: tuple[PreviewSaved, ...] = ()
    requests: tuple[str, ...] = ()
    revision: int = 0
    steps: Curves = field(default_factory=dict)
    detail: Curves = field(default_factory=dict)
    held_out: Curves = field(default_factory=dict)
    systems: Curves = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Compared:
    """The curves of one of several runs that are compared."""

    root: Path
    last: float
    steps: Curves
    held_out: Curves


@dataclass(frozen=True)
class _Made:
    source: object
    mark: object
    curves: Curves
    next_at: float


class Viewer:
    """Makes views of what a reader reads; curves are made anew only when their series grew or the window changed."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self._made: dict[str, _Made] = {}
        self._revision = 0

    def view(self, window: tuple[float, float] | None, now: float) -> RunView:
        """The present moment.

        Args:
            window: steps that are zoomed in on; None for the whole run.
            now: seconds since 1970.
        """
        shown, opening = self._reader.shown, self._reader.behind
        state = shown or self._reader.state
        curves: dict[str, Any] = {}
        if shown is not None:  # what is half read is not worth drawing
            curves = {
                "steps": self._curves("steps", state.steps),
                "detail": self._detail(state.steps, window),
                "held_out": self._curves("held_out", state.held_out),
                "systems": self._curves("systems", state.systems),
            }
        return RunView(
            root=state.root,
            status=self._reader.status,
            now=now,
            opening=opening,
            drawable=shown is not None,
            config=state.config,
            started=state.started,
            latest=state.latest,
            evaluated=state.evaluated,
            best=state.best,
            system=state.system,
            task=state.task,
            step=state.step,
            total_steps=state.total_steps,
            progress=state.progress,
            elapsed_s=state.elapsed_s(now),
            eta_s=state.eta_s(now),
            data_wait=state.data_wait,
            megapixels_per_s=state.megapixels_per_s,
            on_cpu=state.on_cpu,
            verdicts=tuple(state.verdicts()),
            recent=tuple(state.recent),
            previews=tuple(state.previews),
            requests=tuple(pending_requests(state.root)),
            revision=self._revision,
            **curves,
        )

    def compared(self) -> Compared:
        """The curves alone."""
        state = self._reader.state
        steps, held_out = self._curves("steps", state.steps), self._curves("held_out", state.held_out)
        return Compared(state.root, float(state.step), steps, held_out)

    def _curves(self, kind: str, series: Series) -> Curves:
        return self._made_of(kind, series, (series, len(series), series.extent), lambda: _all(series))

    def _detail(self, series: Series, window: tuple[float, float] | None) -> Curves:
        def make() -> Curves:
            if window is None:
                return {}
            # The whole run's buckets are merged points; where few lie in the window, the file has more.
            low, high = window
            coarse = series.stride > 1 and (high - low) * CAPACITY < ENOUGH * (series.extent or (0, 0))[1]
            return _all(self._reader.zoom(low, high) if coarse else series, low, high)

        # A window that follows the newest step moves with it: only its width makes it another one.
        width = None if window is None else round(window[1] - window[0])
        return self._made_of("detail", (series, width), window and (len(series), window), make)

    def _made_of(self, kind: str, source: object, mark: object, make: Callable[[], Curves]) -> Curves:
        """Curves of `source`, made anew when `mark` changed, but so seldom that it costs a hundredth of the time."""
        known = self._made.get(kind)
        begun = time.monotonic()
        if known is None or known.source != source or (known.mark != mark and begun >= known.next_at):
            curves = make()
            ended = time.monotonic()
            many = any(len(curve) >= POINTS // 2 for curve in curves.values())
            least = 0.0 if kind == "detail" else _UNSEEN_S if many else _SHORTEST_S  # panning is seen at once
            rest = max(_REST * (ended - begun), least)
            known = self._made[kind] = _Made(source, mark, curves, ended + rest)
            self._revision += 1
        return known.curves


def _all(series: Series, low: float = -math.inf, high: float = math.inf) -> Curves:
    return {name: series.curve(name, low=low, high=high, points=POINTS) for name in series.names}


def trace(name: str, curve: Curve, ink: int, *, marks: bool = False, factor: float = 1.0) -> Trace:
    """A curve as a chart draws it, its values times `factor`."""
    return Trace(name, curve.x_N, curve.mean_N * factor, curve.low_N * factor, curve.high_N * factor, ink, marks)
