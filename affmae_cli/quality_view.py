"""A quality comparison in the terminal: a table whose cells fill in, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from affmae_cli import output
from affmae_engine.bench.quality import INITS, MODELS, TASKS, Part, PartResult, QualityPlan
from affmae_engine.bench.quality_report import INIT_TITLES, TITLES
from affmae_engine.train.report import duration, number

if TYPE_CHECKING:
    from affmae_engine.bench.quality_run import Progress

_HEADS = {"pretrained": "pre-\ntrained", "scratch": "from\nscratch"}
Look = Callable[["Progress"], None]


@contextlib.contextmanager
def watching(plan: QualityPlan, slots: int, *, quiet: bool = False) -> Iterator[Look]:
    """A function that shows the progress, about ten times a second; `quiet` shows nothing."""
    console = output.console()
    if quiet:
        yield lambda progress: None
        return
    lines = Lines(plan, slots)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lines
        return
    latest: list[Progress] = []

    def look(progress: Progress) -> None:
        lines.announce(progress)
        latest[:] = [progress]

    def render() -> RenderableType:
        return board(plan, latest[0]) if latest else Text("getting ready ...", style="dim")

    with Live(console=console, get_renderable=render, refresh_per_second=2, vertical_overflow="crop"):
        yield look


class Lines:
    """One line per finished part, and one when the plan is made."""

    def __init__(self, plan: QualityPlan, slots: int) -> None:
        self._plan, self._slots = plan, slots
        self._told: set[Part] = set()
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        """Say what is new."""
        self.announce(progress)
        for part, result in progress.results.items():
            if result.status in ("waiting", "running"):
                self._told.discard(part)
            elif part not in self._told:
                self._told.add(part)
                output.say(f"{describe(result)}  eta {duration(progress.eta_s or 0.0)}")

    def announce(self, progress: Progress) -> None:
        """Say what a new stage will do. What an earlier attempt finished is not told again."""
        if progress.stage == self._stage:
            return
        self._stage = progress.stage
        if progress.stage == "calibration":
            kept = {part for part, result in progress.results.items() if result.status == "ok"}
            self._told |= kept
            if kept:
                output.say(f"{len(kept)} of {len(progress.results)} parts were finished earlier and are taken over")
            if len(progress.speeds) < len(self._plan.sizes) * len(MODELS) * len(TASKS):
                output.say(f"measuring how fast each model trains; at least {duration(self._least_s)} in all")
        elif progress.stage == "training":
            for line in announcement(self._plan, progress, self._slots):
                output.say(line)

    @property
    def _least_s(self) -> float:
        """Budgets alone, spread over the cards: what is known before speeds are."""
        pretrainings = len(self._plan.chains())
        finetunings = len(self._plan.parts()) - pretrainings
        whole = pretrainings * self._plan.budget_s + finetunings * self._plan.finetune_budget_s / 2
        return whole / min(self._slots, pretrainings)


def announcement(plan: QualityPlan, progress: Progress, slots: int) -> list[str]:
    """What will be done and how long it is expected to take."""
    lengths = progress.lengths
    assert lengths is not None
    lines = []
    for (size, model), steps in lengths.pretrain.items():
        speed = progress.speeds[size, model, "pretrain"].step_s or 0.0
        lines.append(
            f"{TITLES[model]} {size}: {steps} pretraining steps of {1e3 * speed:.3g} ms in {duration(plan.budget_s)}"
        )
    for size, steps in lengths.finetune.items():
        lines.append(f"finetuning {size}: {steps} steps, both models")
    todo = [result for result in progress.results.values() if result.status == "waiting"]
    many = f", {slots} at a time" if slots > 1 else ""
    lines.append(f"{len(todo)} trainings to do{many}: about {duration(progress.expected_s or 0.0)}")
    return lines


def describe(result: PartResult) -> str:
    """A finished part in a line."""
    who = f"{TITLES[result.model]} {result.size}, seed {result.seed}"
    if result.init is None or result.fraction is None:
        what = "pretraining"
    else:
        what = f"{INIT_TITLES[result.init]}, {result.fraction:.0%} of the labels"
    if result.status != "ok":
        return f"{who}, {what}: {result.status}{f' ({result.note})' if result.note else ''}"
    if result.miou is None:
        loss = number(result.held_out_loss or 0.0)
        return f"{who}, {what}: {result.steps} steps in {_taken(result)}, held-out loss {loss}"
    return f"{who}, {what}: mean IoU {result.miou:.3f} after {result.steps} steps in {_taken(result)}"


def board(plan: QualityPlan, progress: Progress) -> RenderableType:
    """The table of this moment."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    several = len(plan.sizes) > 1
    for title in ("size", "model", "seed")[0 if several else 1 :]:
        table.add_column(title, no_wrap=True)
    table.add_column("pre-\ntraining\nsteps", justify="right")
    for init in INITS:
        for fraction in plan.fractions:
            table.add_column(f"{_HEADS[init]}\n{fraction:.0%}", justify="right")
    for chain in plan.chains():
        first = chain[0]
        cells = [_cell(progress, first)]
        for init in INITS:
            cells += [
                _cell(progress, Part(first.size, first.model, first.seed, init, fraction))
                for fraction in plan.fractions
            ]
        names = [first.size, TITLES[first.model], str(first.seed)]
        table.add_row(*names[0 if several else 1 :], *cells)
    return Group(Text("mean IoU on the test part", style="bold"), table, _footer(progress))


def _cell(progress: Progress, part: Part) -> Text:
    result = progress.results[part]
    if part.name in progress.running:
        step, total = progress.running[part.name]
        if progress.stage == "calibration":
            return Text("measuring", style="cyan")
        return Text(f"{step / total:.0%}" if total else "...", style="cyan")
    if result.status == "ok":
        return Text(f"{result.miou:.3f}" if result.miou is not None else str(result.steps), style="green")
    if result.status in ("waiting", "running"):
        return Text("-", style="dim")
    return Text(result.status, style="red")


def _footer(progress: Progress) -> Text:
    if progress.eta_s is None:
        return Text("measuring how fast each model trains", style="dim")
    done: Sequence[PartResult] = [r for r in progress.results.values() if r.status not in ("waiting", "running")]
    return Text(f"{len(done)}/{len(progress.results)} trainings  eta {duration(progress.eta_s)}", style="bold")


def _taken(result: PartResult) -> str:
    return f"{(result.train_s or 0.0) - (result.startup_s or 0.0):.1f}s"
