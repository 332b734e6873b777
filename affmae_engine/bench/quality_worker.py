"""The work of one part of a quality comparison: train and score it, or measure how fast it trains.

Every piece of work is an ordinary run of the trainer in its own run directory. A failure is a result.
"""

from __future__ import annotations

import gc
import math
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from affmae_engine import run_dir
from affmae_engine.bench.child import Tell
from affmae_engine.bench.quality import Part, PartResult, PartStatus, Speed
from affmae_engine.bench.quality_data import Parts, parts_of, share_of_labels
from affmae_engine.checkpoint import STATE, WEIGHTS
from affmae_engine.config import RunConfig
from affmae_engine.data.loading import PREFETCH
from affmae_engine.data.split import Split
from affmae_engine.data.store import Store
from affmae_engine.errors import AffmaeError, DivergedError, Interrupted, ResourceError, first_line
from affmae_engine.events import Evaluated, Event, RunStarted, StepLogged
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime.device import pick_device
from affmae_engine.runtime.memory import out_of_memory
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train.environment import write_environment
from affmae_engine.train.finetuning import FinetuneTask
from affmae_engine.train.pretraining import PretrainTask
from affmae_engine.train.step import EAGER_STEPS
from affmae_engine.train.task import Task
from affmae_engine.train.trainer import Trainer

WARMUP_STEPS = {"cuda": EAGER_STEPS + 8 * PREFETCH + 6, "cpu": 3}
"""Steps that count as start-up: they compile, record, and use up what eight loader processes prepared ahead."""
FEWEST_WINDOWS = 5
"""Logged intervals of steady steps that a calibration measures at least."""
CALIBRATION_STEPS = 1_000_000
"""Nominal length of a calibration, which is stopped by the clock."""


@dataclass
class Pace:
    """A sink of events that keeps what a result needs, and requests a stop once it has measured for `enough_s`."""

    warmup: int
    on_step: Callable[[int, int], None] = lambda step, total: None
    enough_s: float = math.inf
    stop: StopRequest = field(default_factory=StopRequest)
    windows: list[tuple[int, float]] = field(default_factory=list)
    """Steps, and seconds per step, between two logged events."""
    started: RunStarted | None = None
    last: StepLogged | None = None
    evaluated: Evaluated | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.started = event
        elif isinstance(event, Evaluated):
            self.evaluated = event
        elif isinstance(event, StepLogged):
            self.windows.append((event.step - (self.last.step if self.last else 0), event.step_s))
            self.last = event
            self.on_step(event.step, self.started.total_steps if self.started else event.step)
            steady = self._steady()
            if len(steady) >= FEWEST_WINDOWS and sum(n * step_s for n, step_s in steady) >= self.enough_s:
                self.stop.request()

    @property
    def train_s(self) -> float:
        """Seconds of all steps."""
        return sum(n * step_s for n, step_s in self.windows)

    @property
    def step_s(self) -> float:
        """Median seconds of a step after the start-up."""
        return statistics.median(step_s for _, step_s in self._steady() or self.windows)

    @property
    def startup_s(self) -> float:
        """What the first steps took beyond the usual."""
        first = self.windows[: len(self.windows) - len(self._steady())]
        if len(first) == len(self.windows):
            return 0.0
        return sum(max(0.0, step_s - self.step_s) * n for n, step_s in first)

    def _steady(self) -> list[tuple[int, float]]:
        """The windows that began after the warm-up."""
        before, steady = 0, []
        for n, step_s in self.windows:
            if before >= self.warmup:
                steady.append((n, step_s))
            before += n
        return steady


def do_part(item: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train or calibrate one part; a target of `child`.

    Args:
        item: "store" (path), "runs" (folder), "test_fraction", "part" (`Part` as a dict), "config" (a `RunConfig` as
            JSON), "calibrate_s" (measure the speed for so many seconds instead; None: train).
        tell: gets {"event": "step", "step", "total"} while it trains.

    Returns:
        "status", and "result" (`PartResult` as a dict) or "speed" (`Speed` as a dict).
    """
    store, part = Store.open(Path(item["store"])), Part(**item["part"])
    config, parts, runs = RunConfig.model_validate(item["config"]), parts_of(store, item["test_fraction"]), item["runs"]
    if item["calibrate_s"] is not None:
        speed = calibrate(part, config, store, parts, Path(runs), item["calibrate_s"])
        return {"status": speed.status, "speed": asdict(speed)}
    result = train_part(part, config, store, parts, Path(runs), tell)
    return {"status": result.status, "result": asdict(result)}


def train_part(part: Part, config: RunConfig, store: Store, parts: Parts, runs: Path, tell: Tell) -> PartResult:
    """Train one part and score it. A failure is in the result."""
    began, result, run = time.monotonic(), PartResult.of(part), RunDir(runs / part.name)
    pace = Pace(0)
    try:
        pace = Pace(_warmup(config), lambda step, total: tell({"event": "step", "step": step, "total": total}))
        _free_memory()
        shutil.rmtree(run.root, ignore_errors=True)  # of an interrupted attempt
        task = _task(config, part, store, parts, runs, result)
        config = task.config
        _fit(run, task, store, pace)
        result.status, result.steps = "ok", config.train.steps
        result.images = config.train.steps * config.train.batch_size
        _take_scores(result, pace)
        if part.stage == "pretrain":
            run.checkpoint(config.train.steps).joinpath(WEIGHTS).replace(weights_of(part, runs))
    except Exception as error:  # one part's failure must not hide the results of the others
        traceback.print_exception(error, file=sys.stderr)
        result.status, result.note = _status(error), first_line(error)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    if pace.last is not None and pace.started is not None:
        result.train_s, result.startup_s, result.step_s = pace.train_s, pace.startup_s, pace.step_s
        result.parameters = pace.started.parameters
        result.loss = _loss_of_last_output(pace.last.losses, config, part)
        if pace.warmup == WARMUP_STEPS["cuda"]:
            result.memory_gib = pace.last.memory_peak_gib
    result.seconds = time.monotonic() - began
    return result


def weights_of(part: Part, runs: Path) -> Path:
    """Where the weights of the pretraining that a part starts from are kept."""
    return runs / Part(part.model, part.seed).name / WEIGHTS


def calibrate(part: Part, config: RunConfig, store: Store, parts: Parts, runs: Path, seconds: float) -> Speed:
    """Measure the training speed of a part's kind for a few seconds.

    Where the micro-batch does not fit in memory the trainer halves it; the size it ended with is in the result, so that
    the parts begin with it.
    """
    run = RunDir(runs / f"calibration-{part.name}")
    pace = Pace(_warmup(config), enough_s=seconds)
    train = {"steps": CALIBRATION_STEPS, "log_every": 1 if pace.warmup == WARMUP_STEPS["cpu"] else 5}
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    try:
        shutil.rmtree(run.root, ignore_errors=True)
        task = _task(config, part, store, parts, runs, PartResult.of(part), init=False)
        _fit(run, task, store, pace)
    except Interrupted:
        # The trainer leaves a checkpoint when it is stopped, with the micro-batch in use.
        state = run.read_json(run.checkpoint(run.checkpoint_steps()[0]) / STATE)
        return Speed(pace.step_s, pace.startup_s, int(state["micro_batch"]["used"]))
    except Exception as error:  # a model that cannot be trained here is a result
        traceback.print_exception(error, file=sys.stderr)
        return Speed(None, status=_status(error), note=first_line(error))
    finally:
        shutil.rmtree(run.root, ignore_errors=True)
        _free_memory()
    raise AssertionError("a calibration is stopped by the clock, long before its last step")


def _task(
    config: RunConfig, part: Part, store: Store, parts: Parts, runs: Path, result: PartResult, *, init: bool = True
) -> Task:
    """The trainer's task for a part; notes in `result` how many labeled sections it sees."""
    if part.fraction is None:
        return PretrainTask(config, store, parts=Split(list(parts.pretrain), list(parts.test)))
    train = share_of_labels(parts.train, part.fraction, part.seed)
    result.sections = len(train)
    origin = weights_of(part, runs) if init and part.init == "pretrained" else None
    if origin is not None and not origin.is_file():
        raise AffmaeError("its pretraining gave no weights")
    return FinetuneTask(config, store, init_from=origin, parts=Split(train, list(parts.test)))


def _fit(run: RunDir, task: Task, store: Store, pace: Pace) -> None:
    config = task.config
    run_dir.create(run.root)
    command = {"line": "affmae bench quality", "init_from": None}
    write_environment(
        run, task.name, pick_device(config.train), store=store, command=command, backend=config.kernels.backend
    )
    run.write_config(config, task.name)
    Trainer(run, task, sinks=[pace], stop=pace.stop).fit()


def _take_scores(result: PartResult, pace: Pace) -> None:
    if pace.evaluated is None:
        raise AffmaeError("the run ended without a score")
    metrics = pace.evaluated.metrics
    if result.stage == "pretrain":
        result.held_out_loss = metrics["last"]
    else:
        result.miou, result.dice = metrics["iou"], metrics["dice"]
        result.per_class = pace.evaluated.per_class


def _loss_of_last_output(losses: Mapping[str, float], config: RunConfig, part: Part) -> float:
    """Without the losses of AFFMAE's intermediate decoder steps, which ViT-MAE does not have."""
    if part.stage == "pretrain":
        return losses["last"]
    return config.finetune.focal_weight * losses["focal"] + config.finetune.dice_weight * losses["dice"]


def _warmup(config: RunConfig) -> int:
    return WARMUP_STEPS[pick_device(config.train).device.type]


def _free_memory() -> None:
    """Free what the last training held: compiled code holds on to models."""
    if torch.cuda.is_available():
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _status(error: BaseException) -> PartStatus:
    if out_of_memory(error) is not None or (isinstance(error, ResourceError) and "out of memory" in error.message):
        return "out of memory"
    return "diverged" if isinstance(error, DivergedError) else "failed"
