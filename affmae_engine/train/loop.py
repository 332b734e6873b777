"""The training loop of pretraining and finetuning.

    fit          locks the run, builds the state (new, or from the newest valid checkpoint), always closes
    _train       the loop: a step, and what happens every so many of them
    TrainStep    (step.py) forward, backward, clip, update
    Session      (session.py) log, evaluate, preview, save

The device is read only when a step is logged, evaluated or saved. Of several processes (`distributed.py`) each runs
this loop on its share of every batch; the first one alone touches the run directory.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from affmae_engine import atomic, checkpoint
from affmae_engine.config import RunConfig
from affmae_engine.data.loading import batches
from affmae_engine.errors import ConfigError, Interrupted, ResourceError
from affmae_engine.events import Event, RunStarted
from affmae_engine.model.build import runs_kernels
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.runtime.distributed import Ranks, current_ranks
from affmae_engine.runtime.formatting import line
from affmae_engine.runtime.memory import free_memory, largest_divisor, measured_micro_batch
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train.compile import compile_vit
from affmae_engine.train.ending import Summary, ending, summarised
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.metrics import Recorder, Sink, Stopwatch, Window, drop_superseded
from affmae_engine.train.optim import allocate_state, build_adamw, set_learning_rate
from affmae_engine.train.precompile import compile_kernels
from affmae_engine.train.resume import rounding_notes
from affmae_engine.train.schedule import due, learning_rate
from affmae_engine.train.session import Session
from affmae_engine.train.state import TrainState, restore_state
from affmae_engine.train.step import TrainStep, seed_forward
from affmae_engine.train.task import Task

KEPT_SHARE = 1 / 16
"""Share of a GPU's memory that may hold a labeled training set."""

_engine_log = logging.getLogger("affmae_engine")


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
        PeerLost: another process of the run is gone.
    """
    ranks = current_ranks()
    with _owned(run) if ranks.first else contextlib.nullcontext():
        choice = pick_device(config.train)
        ranks.check_device(choice.device)
        exact_fp32()
        saved, warnings = _starting_point(run, task, resume, ranks)
        if saved is not None and ranks.first:
            drop_superseded(run.metrics, saved.step)
        recorder = Recorder(
            run.metrics if ranks.first else None,
            [lambda event: _log_line(event, config.train.steps), *sinks] if ranks.first else (),
        )
        try:
            state = _new_state(config, task, choice)
            session = Session(run, config, task, choice, state, recorder, stop or StopRequest(), Stopwatch(), ranks)
            with ending(session), ranks.peers_expected():
                if saved is not None:
                    restore_state(saved, state, task, config)
                if ranks.first:
                    _open(session, saved, warnings)
                with session.monitor() if ranks.first else contextlib.nullcontext():
                    _train(session)
            return summarised(session, "finished")
        finally:
            recorder.close()


def _open(session: Session, saved: checkpoint.Checkpoint | None, warnings: list[str]) -> None:
    """What happens once, before the first step."""
    run, config, task = session.run, session.config, session.task
    before = run.read_config() if saved is not None else config
    if config != before:  # a longer run, for example
        run.write_config(config, task.name)
        warnings = [*warnings, *rounding_notes(before, config)]
    session.recorder.emit(_started(session, resumed=saved is not None))
    for message in (*warnings, *task.notes):
        session.warn(message)
    session.clear_requests()
    session.reconcile()
    session.check_space()


def _train(session: Session) -> None:
    state, stop, ranks, train = session.state, session.stop, session.ranks, session.config.train
    share = ranks.share(train.batch_size)
    state.model.train()
    keep_on = getattr(session.task.dataset, "keep_on", None)
    if keep_on is not None and session.choice.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(session.choice.device)
        keep_on(session.choice.device, int(KEPT_SHARE * total))
    if _runs_triton(session):
        _compile(session, share)
    state.micro_batch = _micro_batch(session, share)
    while not _steps(session, state.micro_batch):
        if state.micro_batch == 1:
            raise ResourceError(
                f"out of memory in step {state.step + 1}, even with one image at a time",
                "close other programs on the card, or use a smaller data.crop_size or model.size",
            )
        state.micro_batch = largest_divisor(share, (state.micro_batch + 1) // 2)
        free_memory(session.choice.device)
        session.warn(
            f"out of memory in step {state.step + 1}, which is repeated: {_pieces(state.micro_batch, share)} from here "
            "on, with the same batch and the same samples"
        )
    ranks.wait()  # for the last checkpoint of the first one
    if state.step < train.steps:
        raise Interrupted(
            f"by {stop.reason or 'request'} at step {state.step} of {train.steps}, with a checkpoint",
            f"continue with: affmae {session.task.name} --resume {session.run.root}",
            signal_number=stop.signal_number or 2,
        )


def _compile(session: Session, share: int) -> None:
    """Compiles what the steps run, so that the first one does not wait for it piece by piece."""
    state, task = session.state, session.task
    if not runs_kernels(session.config.model):
        compile_vit(state.model)
        return
    began = time.monotonic()
    sample = task.dataset.sample(0)
    batch = {name: tensor[None].expand(share, *tensor.shape) for name, tensor in sample.items()}
    count = compile_kernels(state.model, task.losses, batch, session.choice)
    _engine_log.info("%d kernels compiled or loaded in %.1f s", count, time.monotonic() - began)


def _micro_batch(session: Session, share: int) -> int:
    """Images at a time: those of the run so far, as configured, or as measured. The same in all processes."""
    state, task, ranks, asked = session.state, session.task, session.ranks, session.config.train.micro_batch
    if state.micro_batch:
        return largest_divisor(share, state.micro_batch)
    if asked != "auto":
        return largest_divisor(share, asked or share)
    # Several processes keep a second copy of the gradients, for the exchange.
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in state.model.parameters())
    found = measured_micro_batch(
        state.model,
        task.losses,
        task.dataset.sample(0),
        session.choice,
        share,
        extra=gradients if ranks.world > 1 else 0,
    )
    found = ranks.smallest(found)
    session.warn(f"train.micro_batch is auto: {_pieces(found, share)}")
    return found


def _pieces(micro: int, share: int) -> str:
    times = share // micro
    return f"{micro} image{'s' if micro > 1 else ''} at a time, {times} time{'s' if times > 1 else ''} a step"


def _steps(session: Session, micro: int) -> bool:
    """Take steps in micro-batches of that size, to the end or a request to stop; False when memory ran out."""
    config, state, ranks = session.config, session.state, session.ranks
    train, optim, total = config.train, config.optim, config.train.steps
    dataset, on_gpu = session.task.dataset, session.choice.device.type == "cuda"
    stream = batches(
        dataset,
        first=state.step,
        batch_size=train.batch_size,
        micro_batch=micro,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.data.workers,
        raw=on_gpu,
    )
    take_step = TrainStep(
        state.model,
        session.task.losses,
        state.optimizer,
        state.scaler,
        session.choice,
        accumulate=train.batch_size // (micro * ranks.world),
        clip_norm=optim.clip_norm,
        record=_uses_cuda_graphs(session),
        ranks=ranks,
        agree=session.agree,
        finish=getattr(dataset, "finish", None) if on_gpu else None,
    )
    with contextlib.closing(stream):
        while state.step < total:
            rate = learning_rate(
                state.step, total_steps=total, warmup_steps=optim.warmup_steps, peak=optim.lr, minimum=optim.min_lr
            )
            set_learning_rate(state.optimizer, rate)
            seed = partial(seed_forward, train.seed, state.step, ranks.rank)
            try:
                result = take_step(stream, seed=seed, watch=session.watch)
            except torch.OutOfMemoryError:
                return False
            state.window.add(result.losses, result.grad_norm, result.bad)
            state.step += 1
            session.watch.stepped()
            session.settle()

            if due(train.log_every, state.step, total):
                session.log(rate)
            if due(train.eval_every, state.step, total):
                session.evaluate()
            if due(train.preview_every, state.step, total):
                session.preview()
            last = state.step == total or session.stopping
            if due(train.checkpoint_every, state.step, total) or session.save_due or last:
                session.save(final=last)
            if last:  # asked once, so that a request cannot come between the question whether to save and that to end
                break
    return True


def _runs_triton(session: Session) -> bool:
    """Whether Triton kernels run here: those of this project, and those that torch.compile makes."""
    device = session.choice.device
    backends = kernel_backends(session.config.kernels.backend, device)
    return device.type == "cuda" and set(backends.values()) == {"triton"}


def _uses_cuda_graphs(session: Session) -> bool:
    """Whether steps are recorded. Several processes exchange gradients in the backward pass, which is not."""
    asked = session.config.kernels.cuda_graph
    possible = session.choice.device.type == "cuda" and session.ranks.world == 1
    return possible and (_runs_triton(session) if asked == "auto" else asked)


def _starting_point(
    run: RunDir, task: Task, resume: bool, ranks: Ranks
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to continue from, which the first process chooses and verifies, and warnings about others."""
    found = _find_start(run, task, resume) if ranks.first else (None, [])
    step = ranks.text(str(found[0].step) if found[0] is not None else "")
    if ranks.first or not step:
        return found
    return checkpoint.Checkpoint(run.checkpoint(int(step)), int(step)), []


def _find_start(run: RunDir, task: Task, resume: bool) -> tuple[checkpoint.Checkpoint | None, list[str]]:
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
    optimizer = build_adamw(task.parameter_groups(config.optim), config.optim, backend=config.kernels.backend)
    allocate_state(optimizer)
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
        device=(f"{session.ranks.world} x " if session.ranks.world > 1 else "") + session.choice.description,
        precision=session.choice.precision,
        parameters=sum(parameter.numel() for parameter in session.state.model.parameters()),
        batch_size=config.train.batch_size,
        backends=kernel_backends(config.kernels.backend, session.choice.device) if runs_kernels(config.model) else {},
    )


def _log_line(event: Event, total_steps: int) -> None:
    text = line(event, total_steps)
    if text:
        _engine_log.info("%s", text)


class _LogFile(logging.FileHandler):
    """A log file whose failure (full disk) stays without consequence."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


@contextlib.contextmanager
def _owned(run: RunDir) -> Iterator[None]:
    """The run is this process's alone: locked, swept of what a killed one left, with its log open."""
    with run.locked(), _logging_to(run):
        for folder in (run.root, run.checkpoints, run.previews):
            atomic.sweep(folder)
        yield


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
