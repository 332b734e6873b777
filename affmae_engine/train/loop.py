"""The training loop of pretraining and finetuning.

    fit          locks the run, builds the state (new, or from the newest valid checkpoint), always closes
    _train       the loop: a step, and what happens every so many of them
    TrainStep    (step.py) forward, backward, clip, update
    Session      (session.py) log, evaluate, preview, save

The device is read only when a step is logged, evaluated or saved.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from affmae_engine import atomic
from affmae_engine.config import RunConfig
from affmae_engine.data.loading import batches
from affmae_engine.errors import AffmaeError, ConfigError, Interrupted, ResourceError
from affmae_engine.events import Event, RunEnded, RunStarted, finite
from affmae_engine.model.build import runs_kernels
from affmae_engine.run_dir import RunDir
from affmae_engine.train import checkpoint
from affmae_engine.train.compile import compile_regions
from affmae_engine.train.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.metrics import Recorder, Sink, Stopwatch, Window
from affmae_engine.train.optim import build_adamw, set_learning_rate
from affmae_engine.train.report import line
from affmae_engine.train.schedule import due, learning_rate
from affmae_engine.train.session import Session
from affmae_engine.train.signals import StopRequest
from affmae_engine.train.state import TrainState, restore_state
from affmae_engine.train.step import TrainStep, seed_forward
from affmae_engine.train.task import Task

_engine_log = logging.getLogger("affmae_engine")

STEPS_WORTH_COMPILING = 2000
"""Compiling costs two minutes the first time, and saves some 50 ms a step (base, 512 px, 32 images, H200)."""


@dataclass(frozen=True)
class Summary:
    """How a run ended; summary.json. status: finished, stopped or failed. metrics: of the last evaluation."""

    status: str
    step: int
    total_steps: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_score: float | None = None
    message: str = ""


def fit(
    run: RunDir,
    config: RunConfig,
    task: Task,
    *,
    sinks: Sequence[Sink] = (),
    resume: bool = False,
    stop: StopRequest | None = None,
) -> Summary:
    """Train `task` in `run` up to `config.train.steps`.

    Args:
        run: an existing run directory whose config.toml is written.
        config: the resolved configuration, with steps (not epochs).
        task: model, data and functions.
        sinks: called with every event, after it is in metrics.jsonl.
        resume: continue from the newest valid checkpoint; otherwise the run must be new.
        stop: read after every step; when it is set the run saves and ends.

    Raises:
        ConfigError: not resumed though there are checkpoints, or resumed and there is none, or other data.
        BusyError: another process trains in this run.
        Interrupted: stopped on request, after a checkpoint.
        DivergedError, ResourceError, CorruptError: see errors.py; the last good checkpoint is untouched.
    """
    with run.locked(), _logging_to(run):
        for folder in (run.root, run.checkpoints, run.previews):
            atomic.sweep(folder)
        choice = pick_device(config.train)
        exact_fp32()
        saved, warnings = _starting_point(run, task, resume)
        recorder = Recorder(run.metrics, [lambda event: _log_line(event, config.train.steps), *sinks])
        try:
            state = _new_state(config, task, choice)
            session = Session(run, config, task, choice, state, recorder, stop or StopRequest(), Stopwatch())
            with _ending(session):
                if saved is not None:
                    restore_state(saved, state, task)
                    if config != run.read_config():  # a longer run, for example
                        run.write_config(config, task.name)
                recorder.emit(_started(session, resumed=saved is not None))
                for message in (*warnings, *task.notes):
                    session.warn(message)
                session.clear_requests()
                session.reconcile()
                session.check_space()
                with session.monitor():
                    _train(session)
            return _summary(session, "finished")
        finally:
            recorder.close()


def _train(session: Session) -> None:
    config, state, task, stop = session.config, session.state, session.task, session.stop
    train, optim, total = config.train, config.optim, config.train.steps
    rank, world = _rank_and_world()
    micro = train.micro_batch or train.batch_size // world
    stream = batches(
        task.dataset,
        first=state.step,
        batch_size=train.batch_size,
        micro_batch=micro,
        rank=rank,
        world=world,
        workers=config.data.workers,
    )
    state.model.train()
    take_step = TrainStep(
        state.model,
        task.losses,
        state.optimizer,
        state.scaler,
        session.choice,
        accumulate=train.batch_size // (micro * world),
        clip_norm=optim.clip_norm,
        record=_accelerate(session, world),
    )
    with contextlib.closing(stream):
        while state.step < total and not stop.requested:
            rate = learning_rate(
                state.step, total_steps=total, warmup_steps=optim.warmup_steps, peak=optim.lr, minimum=optim.min_lr
            )
            set_learning_rate(state.optimizer, rate)
            result = take_step(stream, seed=partial(seed_forward, train.seed, state.step, rank), watch=session.watch)
            state.window.add(result.losses, result.grad_norm, result.bad)
            state.step += 1
            session.watch.stepped()

            if due(train.log_every, state.step, total):
                session.log(rate)
            if due(train.eval_every, state.step, total):
                session.evaluate()
            if due(train.preview_every, state.step, total):
                session.preview()
            last = state.step == total or stop.requested
            if due(train.checkpoint_every, state.step, total) or session.save_requested or last:
                session.save(final=last)
    if state.step < total:
        raise Interrupted(
            f"by {stop.reason} at step {state.step} of {total}, with a checkpoint",
            f"continue with: affmae {task.name} --resume {session.run.root}",
            signal_number=stop.signal_number or 2,
        )


def _accelerate(session: Session, world: int) -> bool:
    """Compiles the model's regions where the configuration says so; returns whether to record CUDA graphs."""
    kernels, device = session.config.kernels, session.choice.device
    backends = kernel_backends(kernels.backend, device)
    fast = device.type == "cuda" and set(backends.values()) == {"triton"}
    long = session.config.train.steps - session.state.step >= STEPS_WORTH_COMPILING
    if device.type == "cuda" and (kernels.compile is True or (kernels.compile == "auto" and fast and long)):
        compile_regions(session.state.model)
    recordable = device.type == "cuda" and world == 1 and session.task.static
    return recordable and (kernels.cuda_graph is True or (kernels.cuda_graph == "auto" and fast))


def _starting_point(run: RunDir, task: Task, resume: bool) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    if not resume:
        if run.checkpoint_steps() or run.metrics.exists():
            raise ConfigError(
                f"{run.root} holds a run already", f"continue it with: affmae {task.name} --resume {run.root}"
            )
        return None, []
    warnings: list[str] = []
    saved = checkpoint.newest_valid(run, warnings.append)
    if saved is None:
        raise ConfigError(
            f"{run.root} has no checkpoint to continue from", "it ended before the first one: start it again"
        )
    if saved.state().get("fingerprint") != task.fingerprint:
        raise ConfigError(
            f"the data is not what {run.root} was trained on", "put it back as it was, or begin anew with --init-from"
        )
    return saved, warnings


def _new_state(config: RunConfig, task: Task, choice: DeviceChoice) -> TrainState:
    model = task.model.to(choice.device)
    optimizer = build_adamw(task.parameter_groups(config.optim), config.optim)
    scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.dtype == torch.float16)
    return TrainState(model, optimizer, scaler, Window(choice.device))


def _started(session: Session, *, resumed: bool) -> RunStarted:
    config = session.config
    return RunStarted(
        task=session.task.name,
        run=session.run.root.name,
        step=session.state.step,
        total_steps=config.train.steps,
        resumed=resumed,
        device=session.choice.description,
        precision=session.choice.precision,
        parameters=sum(parameter.numel() for parameter in session.state.model.parameters()),
        batch_size=config.train.batch_size,
        backends=kernel_backends(config.kernels.backend, session.choice.device) if runs_kernels(config.model) else {},
    )


@contextlib.contextmanager
def _ending(session: Session) -> Iterator[None]:
    """Whatever ends the block is told in a last event and in summary.json."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _close(session, "failed", "out of memory on the card")
        raise ResourceError(
            f"out of memory on the card at step {session.state.step}",
            "use a smaller train.micro_batch (the result stays the same), or a smaller data.crop_size",
        ) from error
    except Interrupted as error:
        _close(session, "stopped", error.message)
        raise
    except BaseException as error:
        _close(session, "failed", error.message if isinstance(error, AffmaeError) else repr(error))
        if not isinstance(error, AffmaeError):
            _engine_log.exception("the run failed")
        raise
    _close(session, "finished", "")


def _close(session: Session, status: str, message: str) -> None:
    session.recorder.emit(
        RunEnded(step=session.state.step, status=status, seconds=session.watch.seconds, message=message)
    )
    session.recorder.sync()
    try:
        atomic.commit_json(session.run.summary, finite(asdict(_summary(session, status, message))))
    except ResourceError as error:
        _engine_log.error("%s", error.message)


def _summary(session: Session, status: str, message: str = "") -> Summary:
    state = session.state
    best_step, best_score = state.best or (None, None)
    return Summary(
        status=status,
        step=state.step,
        total_steps=session.config.train.steps,
        seconds=session.watch.seconds,
        metrics=state.metrics,
        best_step=best_step,
        best_score=best_score,
        message=message,
    )


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _log_line(event: Event, total_steps: int) -> None:
    text = line(event, total_steps)
    if text:
        _engine_log.info("%s", text)


class _LogFile(logging.FileHandler):
    """A log file whose failure (full disk) stays without consequence."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


@contextlib.contextmanager
def _logging_to(run: RunDir) -> Iterator[None]:
    handler = _LogFile(run.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = _engine_log.level
    _engine_log.addHandler(handler)
    _engine_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _engine_log.removeHandler(handler)
        _engine_log.setLevel(level)
        handler.close()
