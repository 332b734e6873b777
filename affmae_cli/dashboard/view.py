"""What the screens know of a run at one moment: made by the reading thread, never changed, handed over in a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from affmae_cli.dashboard.plot import Trace
from affmae_cli.dashboard.series import Curve, Series
from affmae_cli.dashboard.state import RunState
from affmae_cli.dashboard.status import Status
from affmae_cli.dashboard.verdicts import Verdict
from affmae_engine.config import RunConfig
from affmae_engine.events import Evaluated, Event, PreviewSaved, RunEnded, RunStarted, StepLogged, SystemSampled

POINTS = 2048
"""Points of a curve that are handed over: several for every column of a wide terminal."""
Curves = Mapping[str, Curve]


@dataclass(frozen=True, eq=False)
class RunView:
    """One moment of a run. The events are the newest of their kind, None before there is one.

    now: seconds since 1970. elapsed_s, eta_s: of the whole run; NaN when not known. data_wait: share of the wall time.
    steps, held_out, systems: curves by the names that `RunState` gives them, the same object while nothing was added.
    recent: notable events, oldest first. requests: what the trainer was asked for and has not taken yet.
    """

    root: Path
    status: Status
    now: float
    config: RunConfig | None = None
    started: RunStarted | None = None
    latest: StepLogged | None = None
    evaluated: Evaluated | None = None
    best: Evaluated | None = None
    system: SystemSampled | None = None
    ended: RunEnded | None = None
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
    steps: Curves = field(default_factory=dict)
    held_out: Curves = field(default_factory=dict)
    systems: Curves = field(default_factory=dict)


class Viewer:
    """Makes views of one state; curves are made anew only when their series grew."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._made: dict[str, tuple[object, Curves]] = {}

    def view(self, status: Status, requests: list[str], now: float) -> RunView:
        """The present moment. now: seconds since 1970."""
        state = self._state
        return RunView(
            root=state.root,
            status=status,
            now=now,
            config=state.config,
            started=state.started,
            latest=state.latest,
            evaluated=state.evaluated,
            best=state.best,
            system=state.system,
            ended=state.ended,
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
            requests=tuple(requests),
            steps=self._curves("steps", state.steps),
            held_out=self._curves("held_out", state.held_out),
            systems=self._curves("systems", state.systems),
        )

    def _curves(self, kind: str, series: Series) -> Curves:
        mark = (series, len(series), series.extent)
        known, curves = self._made.get(kind, (None, {}))
        if known != mark:
            curves = {name: series.curve(name, points=POINTS) for name in series.names}
            self._made[kind] = (mark, curves)
        return curves


def trace(name: str, curve: Curve, ink: int, *, marks: bool = False, factor: float = 1.0) -> Trace:
    """A curve as a chart draws it, its values times `factor`."""
    return Trace(name, curve.x_N, curve.mean_N * factor, curve.low_N * factor, curve.high_N * factor, ink, marks)
