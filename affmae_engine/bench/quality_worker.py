"""A process of a quality comparison: takes a job on stdin, does its work one after the other, tells on stdout.

    python -m affmae_engine.bench.quality_worker

Messages are lines of JSON, {"event": "ready" | "began" | "step" | "ended", ...}. Whatever else is printed goes to
stderr. Every piece of work is an ordinary run of the trainer in a run directory of its own; a failure is a result.
Unusual: stdin stays open for as long as the comparison lives, and this process ends with it (`lifeline`).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from affmae_engine import run_dir
from affmae_engine.bench.lifeline import end_with_parent
from affmae_engine.bench.quality import Part, PartResult, Speed, Status
from affmae_engine.bench.quality_data import Parts, parts_of, share_of_labels
from affmae_engine.bench.quality_pace import WARMUP_STEPS, Pace
from affmae_engine.config import RunConfig
from affmae_engine.data.split import Split
from affmae_engine.data.store import Store
from affmae_engine.errors import AffmaeError, DivergedError, Interrupted, ResourceError, first_line
from affmae_engine.events import finite
from affmae_engine.run_dir import RunDir
from affmae_engine.train.checkpoint import STATE, WEIGHTS
from affmae_engine.train.device import pick_device
from affmae_engine.train.environment import write_environment
from affmae_engine.train.finetuning import finetune_task
from affmae_engine.train.loop import fit
from affmae_engine.train.memory import out_of_memory
from affmae_engine.train.pretraining import pretrain_task
from affmae_engine.train.task import Task

Tell = Callable[[dict[str, Any]], None]

CALIBRATION_STEPS = 1_000_000
"""Nominal length of a calibration, which is stopped by the clock."""


@dataclass(frozen=True)
class Work:
    """A part to train, or with `calibrate_s` to measure for so many seconds; `config` is a `RunConfig` as JSON."""

    part: Part
    config: dict[str, Any]
    calibrate_s: float | None = None


@dataclass(frozen=True)
class Job:
    """What one process does: work on one store, with runs in one folder."""

    store: str
    runs: str
    test_fraction: float
    work: tuple[Work, ...]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        value = json.loads(text)
        work = [Work(Part(**entry["part"]), entry["config"], entry["calibrate_s"]) for entry in value.pop("work")]
        return cls(**value, work=tuple(work))


def train_part(work: Work, store: Store, parts: Parts, runs: Path, tell: Tell) -> PartResult:
    """Train one part and score it. A failure is in the result."""
    begun, part = time.monotonic(), work.part
    result = PartResult.of(part)
    run, pace = RunDir(runs / part.name), Pace(0)
    try:
        config = RunConfig.model_validate(work.config)
        pace = Pace(_warmup(config), lambda step, total: tell(_step(part, step, total)))
        _reset_memory(config)
        shutil.rmtree(run.root, ignore_errors=True)  # what an interrupted attempt left
        config, task = _task(config, part, store, parts, runs, result)
        run_dir.create(run.root)
        _fit(run, config, task, store, pace)
        result.status, result.steps = "ok", config.train.steps
        result.images = config.train.steps * config.train.batch_size
        _take_scores(result, pace)
        if part.stage == "pretrain":
            run.checkpoint(config.train.steps).joinpath(WEIGHTS).replace(weights_of(part, runs))
    except Exception as error:  # one part's failure must not hide the results of the others
        traceback.print_exception(error, file=sys.stderr)
        result.status, result.note = _status(error), first_line(error)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # gigabytes that nobody asked for
    _take_times(result, pace, work)
    result.seconds = time.monotonic() - begun
    return result


def weights_of(part: Part, runs: Path) -> Path:
    """Where the weights of the pretraining that a part starts from are kept."""
    return runs / Part(part.size, part.model, part.seed).name / WEIGHTS


def calibrate(work: Work, store: Store, parts: Parts, runs: Path) -> Speed:
    """Measure the training speed of a part's kind: its own model, data and loop, for a few seconds.

    Where the micro-batch does not fit into the card's memory, the loop halves it; what it came to is in the result, so
    that the parts begin with it.
    """
    config = RunConfig.model_validate(work.config)
    run = RunDir(runs / f"calibration-{work.part.name}")
    pace = Pace(_warmup(config), enough_s=work.calibrate_s or 0.0)
    every = 1 if pace.warmup == WARMUP_STEPS["cpu"] else 5
    train = {"steps": CALIBRATION_STEPS, "log_every": every}
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    try:
        shutil.rmtree(run.root, ignore_errors=True)
        config, task = _task(config, work.part, store, parts, runs, PartResult.of(work.part), init=False)
        run_dir.create(run.root)
        _fit(run, config, task, store, pace)
    except Interrupted:
        return Speed(pace.step_s, pace.startup_s, _used_micro_batch(run))
    except Exception as error:  # a model that cannot be trained here is a result
        traceback.print_exception(error, file=sys.stderr)
        return Speed(None, status=_status(error), note=first_line(error))
    finally:
        shutil.rmtree(run.root, ignore_errors=True)
        _free()
    raise AssertionError("a calibration is stopped by the clock, long before its last step")


def _used_micro_batch(run: RunDir) -> int:
    """What the loop ended with, from the checkpoint that it leaves when it is stopped."""
    return int(run.read_json(run.checkpoint(run.checkpoint_steps()[0]) / STATE)["micro_batch"]["used"])


def _task(
    config: RunConfig, part: Part, store: Store, parts: Parts, runs: Path, result: PartResult, *, init: bool = True
) -> tuple[RunConfig, Task]:
    """The trainer's task for a part; notes in `result` how many labelled sections it sees."""
    if part.fraction is None:
        return pretrain_task(config, store, parts=Split(list(parts.pretrain), list(parts.test)))
    train = share_of_labels(parts.train, part.fraction, part.seed)
    result.sections = len(train)
    origin = weights_of(part, runs) if init and part.init == "pretrained" else None
    if origin is not None and not origin.is_file():
        raise AffmaeError("its pretraining gave no weights")
    tuned, task, _ = finetune_task(config, store, init_from=origin, parts=Split(train, list(parts.test)))
    return tuned, task


def _fit(run: RunDir, config: RunConfig, task: Task, store: Store, pace: Pace) -> None:
    command = {"line": "affmae bench --quality", "init_from": None}
    write_environment(
        run, task.name, pick_device(config.train), store=store, command=command, backend=config.kernels.backend
    )
    run.write_config(config, task.name)
    fit(run, config, task, sinks=[pace], stop=pace.stop)


def _take_scores(result: PartResult, pace: Pace) -> None:
    if pace.evaluated is None:
        raise AffmaeError("the run ended without a score")
    metrics = pace.evaluated.metrics
    if result.stage == "pretrain":
        result.held_out_loss = metrics["last"]
    else:
        result.miou, result.dice = metrics["iou"], metrics["dice"]
        result.per_class = pace.evaluated.per_class


def _take_times(result: PartResult, pace: Pace, work: Work) -> None:
    if pace.last is None or pace.started is None:
        return
    result.train_s, result.startup_s, result.step_s = pace.train_s, pace.startup_s, pace.step_s
    result.parameters, result.loss = pace.started.parameters, _loss_of_last_output(pace.last.losses, work)
    if torch.cuda.is_available() and pace.warmup == WARMUP_STEPS["cuda"]:
        result.memory_gib = pace.last.memory_peak_gib


def _loss_of_last_output(losses: Mapping[str, float], work: Work) -> float:
    """What both models have: without the losses of AFFMAE's intermediate decoder steps, which ViT-MAE has none of."""
    if work.part.stage == "pretrain":
        return losses["last"]
    finetune = RunConfig.model_validate(work.config).finetune
    return finetune.focal_weight * losses["focal"] + finetune.dice_weight * losses["dice"]


def _warmup(config: RunConfig) -> int:
    return WARMUP_STEPS[pick_device(config.train).device.type]


def _reset_memory(config: RunConfig) -> None:
    _free()
    if pick_device(config.train).device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free() -> None:
    """Give back what the last training held: compiled code holds on to models."""
    if torch.cuda.is_available():
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _status(error: BaseException) -> Status:
    if out_of_memory(error) is not None or (isinstance(error, ResourceError) and "out of memory" in error.message):
        return "out of memory"
    return "diverged" if isinstance(error, DivergedError) else "failed"


def _step(part: Part, step: int, total: int) -> dict[str, Any]:
    return {"event": "step", "name": part.name, "step": step, "total": total}


def work_through(job: Job, tell: Tell) -> None:
    """Do the job, or as much of it as this process can: a failure on a card may leave it unable to go on."""
    store, runs = Store.open(Path(job.store)), Path(job.runs)
    parts = parts_of(store, job.test_fraction)
    tell({"event": "ready"})
    for work in job.work:
        tell({"event": "began", "name": work.part.name})
        if work.calibrate_s is not None:
            speed = calibrate(work, store, parts, runs)
            status, outcome = speed.status, {"speed": asdict(speed)}
        else:
            result = train_part(work, store, parts, runs, tell)
            status, outcome = result.status, {"result": result.as_dict()}
        tell({"event": "ended", "name": work.part.name, **outcome})
        if status != "ok" and not _card_answers():
            return


def _card_answers() -> bool:
    """Whether this process can still compute: after some errors every further call fails, or every random number."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Read the job, do it."""
    job = Job.from_json(sys.stdin.readline())
    end_with_parent(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        channel.write(json.dumps(finite(message)) + "\n")
        channel.flush()

    work_through(job, tell)


if __name__ == "__main__":
    main()
