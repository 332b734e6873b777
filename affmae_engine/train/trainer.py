"""The trainer of pretraining and finetuning: `fit` takes steps and, after each, does what is due.

    Trainer     opens a run (new, or from its newest valid checkpoint), trains a `Task` in it, records how it ended
    TrainStep   (step.py) forward, backward, clip, update

The device is read only when a step is logged, evaluated or saved. Of several processes (`runtime.distributed`) each
has a trainer for its share of every batch. Rank 0 alone writes to the run, evaluates and saves; the others read their
(equal) means when a step is logged, so that they come to the same judgement, and wait for rank 0 in their next step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from affmae_engine import atomic, checkpoint
from affmae_engine.data.loading import batches
from affmae_engine.errors import (
    AffmaeError,
    ConfigError,
    DivergedError,
    Interrupted,
    ResourceError,
    of_system,
)
from affmae_engine.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PreviewSaved,
    RequestTaken,
    RunEnded,
    RunStarted,
    StepLogged,
    Warned,
    finite,
    line,
)
from affmae_engine.model.build import runs_kernels
from affmae_engine.picture_files import save_png
from affmae_engine.run_dir import CHECKPOINT, REQUESTS, STOP, RunDir
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, memory_gib, pick_device
from affmae_engine.runtime.distributed import current_ranks, peer_lost_error
from affmae_engine.runtime.gpu_stats import Card
from affmae_engine.runtime.log_file import logging_to
from affmae_engine.runtime.memory import free_memory, largest_divisor, measured_micro_batch
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train.compile import compile_vit
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.metrics import Means, Recorder, Sink, Stopwatch, Window, drop_superseded
from affmae_engine.train.monitor import Monitor
from affmae_engine.train.optim import allocate_state, build_adamw, set_learning_rate
from affmae_engine.train.precompile import compile_kernels
from affmae_engine.train.resume import rounding_notes
from affmae_engine.train.saving import Writer
from affmae_engine.train.schedule import due, learning_rate, times_due
from affmae_engine.train.state import TrainState, restore_state, take_snapshot
from affmae_engine.train.step import StepResult, TrainStep, seed_forward
from affmae_engine.train.task import Evaluation, Task

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail (disk full) before the run stops."""
KEPT_SHARE = 1 / 16
"""Share of a GPU's memory that may hold a labeled training set."""
FORWARD_SHARE = 1 / 3
"""Share of a step that its forward pass takes, to guess the time of the first evaluation."""

_LESS_MEMORY = "close other programs on the GPU, or use a smaller data.crop_size or model.size"
FIRST_PREVIEW_S = 40.0
"""Seconds after the start of a run when its first preview is drawn, whatever `train.preview_every` says."""
_log = logging.getLogger(__name__)


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


class Trainer:
    """Trains one task in one run directory, up to `config.train.steps`.

    Args:
        run: an existing run directory whose config.toml is written.
        task: model, data, losses and evaluation, and the configuration.
        sinks: called with every event, after it is in metrics.jsonl.
        resume: continue from the newest valid checkpoint, or from step 0 where the run was killed before its first;
            otherwise the run must be new.
        stop: read after every step; when it is set the run saves and ends.
    """

    def __init__(
        self,
        run: RunDir,
        task: Task,
        *,
        sinks: Sequence[Sink] = (),
        resume: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        self.run, self.config, self.task, self.resume = run, task.config, task, resume
        self.stop = stop or StopRequest()
        self.ranks = current_ranks()
        self.writer = Writer(run, task.config.train.keep_checkpoints)
        self._sinks = sinks
        self._failed_saves = 0
        self._save_requested = self._stop_agreed = False
        self._stall_s = 0.0
        self._previewed = run.previews.is_dir() and any(run.previews.glob("*.png"))
        # Made by `_opened`, when the run is this process's alone:
        self.choice: DeviceChoice
        self.state: TrainState
        self.watch: Stopwatch
        self.recorder: Recorder
        # Made by `prepare_steps`, anew for each size of the micro-batch:
        self._batches: Generator[dict[str, Tensor], None, None]
        self._take_step: TrainStep

    def fit(self) -> Summary:
        """Train to the end.

        Returns:
            the summary of the finished run.

        Raises:
            ConfigError: not resumed though there are checkpoints, or resumed with other data.
            BusyError: another process trains in this run.
            Interrupted: stopped on request, after a checkpoint.
            DivergedError, ResourceError, CorruptError: see errors.py; the last good checkpoint is untouched.
            PeerLost: another process of the run is gone.
        """
        train, total = self.config.train, self.config.train.steps
        with self._opened() as (saved, warnings), self._end_recorded(), self.ranks.peers_expected():
            self.start(saved, warnings)
            self.keep_data_on_gpu()
            self.compile_kernels()
            self.choose_micro_batch()
            self.prepare_steps()
            with self._monitored(), self._batches_closed():
                while self.state.step < total:
                    rate = self.set_learning_rate()
                    seed = partial(seed_forward, train.seed, self.state.step, self.ranks.rank)
                    result: StepResult | None = None
                    with contextlib.suppress(torch.OutOfMemoryError):
                        result = self._take_step(self._batches, seed=seed, watch=self.watch)
                    if result is None:  # the step has changed nothing
                        self.halve_micro_batch()
                        continue
                    self.record_step(result)

                    step = self.state.step
                    if due(train.log_every, step, total):
                        self.log(rate)
                    if due(train.eval_every, step, total):
                        self.evaluate()
                    if due(train.preview_every, step, total) or self.first_preview_due:
                        self.preview()
                    # Read once: a stop requested between two reads would end the run without its checkpoint.
                    last = step == total or self.stopping
                    if due(train.checkpoint_every, step, total) or self.save_due or last:
                        self.save(final=last)
                    if last:
                        break
                self.finish()
        return self.summary("finished")

    # ---- before the first step

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[checkpoint.Checkpoint | None, list[str]]]:
        """The run is this process's alone: locked, swept, with its log open, and a state that is not trained yet.

        Yields:
            the checkpoint to continue from, if there is one, and warnings about others.
        """
        run, first = self.run, self.ranks.first
        with contextlib.ExitStack() as stack:
            if first:
                stack.enter_context(run.locked())
                stack.enter_context(logging_to(run.log))
                for folder in (run.root, run.checkpoints, run.previews):
                    atomic.sweep(folder)  # what a killed process left
            stack.callback(self.writer.close)
            self.choice = pick_device(self.config.train)
            self.ranks.check_device(self.choice.device)
            exact_fp32()
            saved, warnings = self._starting_point()
            if self.resume and first:
                drop_superseded(run.metrics, saved.step if saved is not None else 0)
            sinks = [self._log_event, *self._sinks] if first else []
            self.recorder = Recorder(run.metrics if first else None, sinks)
            stack.callback(self.recorder.close)
            self.state = self._new_state()
            self.watch = Stopwatch()
            self._saved_at = self.watch.started
            yield saved, warnings

    def _starting_point(self) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """The checkpoint to continue from, which rank 0 chooses and verifies, and warnings about others."""
        saved, warnings = self._find_checkpoint() if self.ranks.first else (None, [])
        step = self.ranks.broadcast_text(str(saved.step) if saved is not None else "")
        if step and not self.ranks.first:
            saved = checkpoint.Checkpoint(self.run.checkpoint(int(step)), int(step))
        return saved, warnings

    def _find_checkpoint(self) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        run, task = self.run, self.task
        if not self.resume:
            if run.checkpoint_steps() or run.metrics.exists():
                raise ConfigError(
                    f"{run.root} already contains a run", f"continue it with: affmae {task.name} --resume {run.root}"
                )
            return None, []
        warnings: list[str] = []
        saved = checkpoint.newest_valid(run, warnings.append)
        if saved is None:
            return None, ["the run ended before its first checkpoint: it starts again from step 0"]
        if saved.state().get("fingerprint") != task.fingerprint:
            raise ConfigError(
                f"the data is not what {run.root} was trained on",
                "put it back as it was, or begin anew with --init-from",
            )
        return saved, warnings

    def _new_state(self) -> TrainState:
        config, device = self.config, self.choice.device
        model = self.task.model.to(device)
        optimizer = build_adamw(self.task.parameter_groups(config.optim), config.optim, backend=config.kernels.backend)
        allocate_state(optimizer)
        scaler = torch.amp.GradScaler(device.type, enabled=self.choice.dtype == torch.float16)
        return TrainState(model, optimizer, scaler, Window(device))

    def start(self, saved: checkpoint.Checkpoint | None, warnings: Sequence[str]) -> None:
        """Restore the checkpoint, record the start, and check that the run can be carried out."""
        run, config = self.run, self.config
        if saved is not None:
            restore_state(saved, self.state, self.task, config)
        self.ranks.broadcast_module(self.state.model)
        if not self.ranks.first:
            return
        before = run.read_config() if self.resume else config
        if config != before:  # a longer run, for example
            run.write_config(config, self.task.name)
            warnings = [*warnings, *rounding_notes(before, config)]
        self.recorder.emit(self._started())
        for message in (*warnings, *self.task.notes):
            self.warn(message)
        for name in REQUESTS:  # that an earlier process left behind
            (run.control / name).unlink(missing_ok=True)
        self._reconcile()
        checkpoint.check_space(run, self.state.model.state_dict(), self.config.train.keep_checkpoints)

    def _started(self) -> RunStarted:
        config, world = self.config, self.ranks.world
        backends = kernel_backends(config.kernels.backend, self.choice.device) if runs_kernels(config.model) else {}
        return RunStarted(
            task=self.task.name,
            run=self.run.root.name,
            step=self.state.step,
            total_steps=config.train.steps,
            resumed=self.resume,
            device=(f"{world} x " if world > 1 else "") + self.choice.description,
            precision=self.choice.precision,
            parameters=sum(parameter.numel() for parameter in self.state.model.parameters()),
            batch_size=config.train.batch_size,
            backends=backends,
        )

    def _reconcile(self) -> None:
        """Put aside checkpoints newer than the state (damaged ones), and make best.json agree with it."""
        for path in checkpoint.set_aside_newer(self.run, self.state.step):
            self.warn(f"a damaged checkpoint was renamed to {path.name}; delete it when you no longer need it")
        best = self.state.best
        if best is None or not self.run.checkpoint(best[0]).is_dir():
            self.run.best.unlink(missing_ok=True)
            self.state.best = None
        elif checkpoint.best_step(self.run) != best[0]:
            checkpoint.write_best(self.run, best[0], "score", best[1])

    # ---- steps

    def keep_data_on_gpu(self) -> None:
        """Copy the training data to the GPU, where the dataset can work from there and it is small enough."""
        keep_on = getattr(self.task.dataset, "keep_on", None)
        device = self.choice.device
        if keep_on is not None and device.type == "cuda":
            keep_on(device, int(KEPT_SHARE * torch.cuda.mem_get_info(device)[1]))

    def compile_kernels(self) -> None:
        """Compile what the steps run, so that the first one does not wait for it piece by piece."""
        state, task = self.state, self.task
        state.model.train()
        if not self._runs_triton():
            return
        if not runs_kernels(self.config.model):
            compile_vit(state.model)
            return
        began = time.monotonic()
        share = self.ranks.local_batch_size(self.config.train.batch_size)
        dataset: Any = task.dataset
        finish = getattr(dataset, "finish", None)
        batch, raw = (
            {name: tensor.expand(share, *tensor.shape) for name, tensor in sample.items()}
            for sample in (dataset.sample(0), {} if finish is None else dataset.raw(0))
        )
        count = compile_kernels(state.model, task.losses, batch, self.choice, finish=finish, raw=raw)
        _log.info("%d kernels compiled or loaded in %.1f s", count, time.monotonic() - began)

    def choose_micro_batch(self) -> None:
        """Images at a time: those of the run so far, as configured, or as measured. The same in all processes."""
        state, task, ranks, asked = self.state, self.task, self.ranks, self.config.train.micro_batch
        share = ranks.local_batch_size(self.config.train.batch_size)
        if state.micro_batch or asked != "auto":
            wanted = state.micro_batch or (share if asked is None else int(asked))
            state.micro_batch = largest_divisor(share, wanted)
            return
        # Several processes keep a second copy of the gradients, for the exchange.
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in state.model.parameters())
        extra = gradients if ranks.world > 1 else 0
        found = measured_micro_batch(state.model, task.losses, task.dataset.sample(0), self.choice, share, extra=extra)
        state.micro_batch = ranks.smallest(found)
        _log.info("train.micro_batch is auto: %s", _pieces(state.micro_batch, share))

    def prepare_steps(self) -> None:
        """Start the data loader and make the step, for the micro-batch in use."""
        config, state, ranks = self.config, self.state, self.ranks
        micro, batch_size, dataset = state.micro_batch, config.train.batch_size, self.task.dataset
        on_gpu = self.choice.device.type == "cuda"
        self._batches = batches(
            dataset,
            first=state.step,
            batch_size=batch_size,
            micro_batch=micro,
            rank=ranks.rank,
            world=ranks.world,
            workers=config.data.workers,
            raw=on_gpu,
        )
        self._take_step = TrainStep(
            state.model,
            self.task.losses,
            state.optimizer,
            state.scaler,
            self.choice,
            accumulate=batch_size // (micro * ranks.world),
            clip_norm=config.optim.clip_norm,
            record=self._records_steps(),
            ranks=ranks,
            agree=self._any_out_of_memory,
            finish=getattr(dataset, "finish", None) if on_gpu else None,
        )

    def halve_micro_batch(self) -> None:
        """After a step ran out of memory: repeat it, and take all others, in smaller pieces.

        Raises:
            ResourceError: not even one image fits.
        """
        state, share = self.state, self.ranks.local_batch_size(self.config.train.batch_size)
        if state.micro_batch == 1:
            raise ResourceError(f"out of memory in step {state.step + 1}, even with one image at a time", _LESS_MEMORY)
        state.micro_batch = largest_divisor(share, (state.micro_batch + 1) // 2)
        self._batches.close()
        del self._take_step  # with what it has captured
        free_memory(self.choice.device)
        self.warn(
            f"out of memory in step {state.step + 1}, which is repeated: {_pieces(state.micro_batch, share)} from here "
            "on, with the same batch and the same samples"
        )
        self.prepare_steps()

    def set_learning_rate(self) -> float:
        """Give the optimizer the learning rate of the coming step; returns it."""
        optim = self.config.optim
        rate = learning_rate(
            self.state.step,
            total_steps=self.config.train.steps,
            warmup_steps=optim.warmup_steps,
            peak=optim.lr,
            minimum=optim.min_lr,
        )
        set_learning_rate(self.state.optimizer, rate)
        return rate

    def record_step(self, result: StepResult) -> None:
        """Take in a finished step, and what became of a checkpoint that was being written meanwhile."""
        self.state.window.add(result.losses, result.grad_norm, result.bad)
        self.state.step += 1
        self.watch.stepped()
        self.settle()

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this step; several processes agreed on it during the step."""
        return self._stop_agreed if self.ranks.world > 1 else self.stop.requested

    def _any_out_of_memory(self, here: bool) -> bool:
        """Once a step: whether any process ran out of memory. Requests to stop are agreed on along the way."""
        found, self._stop_agreed = self.ranks.any_rank(here, self.stop.requested)
        return found

    @contextlib.contextmanager
    def _batches_closed(self) -> Iterator[None]:
        """The processes of the data loader end with the block."""
        try:
            yield
        finally:
            self._batches.close()

    def _runs_triton(self) -> bool:
        """Whether Triton kernels run here: those of this project, and those that torch.compile makes."""
        backends = kernel_backends(self.config.kernels.backend, self.choice.device)
        return self.choice.device.type == "cuda" and set(backends.values()) == {"triton"}

    def _records_steps(self) -> bool:
        asked = self.config.kernels.cuda_graph
        return self.choice.device.type == "cuda" and (self._runs_triton() if asked == "auto" else asked)

    # ---- after a step

    def log(self, rate: float) -> None:
        """Read the device, record the means since the last log, obey requests in control/.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        means = self.state.window.read()
        pace = self.watch.lap(self.config.train.batch_size)
        now, peak = memory_gib(self.choice.device)
        self.recorder.emit(
            StepLogged(
                step=self.state.step,
                losses=means.losses,
                lr=rate,
                grad_norm=means.grad_norm,
                images_per_s=pace.images_per_s,
                data_wait=pace.data_wait,
                step_s=pace.step_s,
                memory_gib=now,
                memory_peak_gib=peak,
                eta_s=self._time_left(pace.images_per_s),
                skipped=means.skipped,
            )
        )
        self._judge(means)
        if self.ranks.first:
            self.take_requests()

    def _time_left(self, images_per_s: float) -> float:
        """Seconds to the end of the run, right after a step: of steps, evaluations, previews and checkpoints."""
        train, step = self.config.train, self.state.step
        every = {"evaluation": train.eval_every, "preview": train.preview_every, "checkpoint": train.checkpoint_every}
        left = {kind: times_due(interval, step, train.steps) for kind, interval in every.items()}
        images_per_s /= self.ranks.world  # rank 0 evaluates alone
        guess = FORWARD_SHARE * self.task.evaluated_images / images_per_s if images_per_s > 0 else 0.0
        return self.watch.time_left(train.steps - step, left, {"evaluation": guess})

    def evaluate(self) -> None:
        """Record held-out figures; a best one asks for a checkpoint."""
        if not self.ranks.first:
            return
        start = time.monotonic()
        with self._evaluating("evaluation"):
            found = self.task.evaluate(self.state.model, self.choice.device)
        best = self._is_best(found)
        if best:
            self.state.best = (self.state.step, found.score)
            self._save_requested = True
        self.state.metrics = dict(found.metrics)
        self.recorder.emit(
            Evaluated(
                step=self.state.step,
                metrics=found.metrics,
                per_class=found.per_class,
                effective_rank=found.effective_rank,
                best=best,
                seconds=time.monotonic() - start,
            )
        )

    @property
    def first_preview_due(self) -> bool:
        """Whether a run that draws previews has none after FIRST_PREVIEW_S: people want to see something."""
        waited = time.monotonic() - self.watch.started >= FIRST_PREVIEW_S
        return self.config.train.preview_every > 0 and not self._previewed and waited

    def preview(self) -> None:
        """Write the task's pictures. A full disk or a full GPU costs the picture, not the run."""
        self._previewed = True
        if not self.ranks.first:
            return
        try:
            with self._evaluating("preview"):
                pictures = self.task.preview(self.state.model, self.choice.device)
        except torch.OutOfMemoryError:
            self.warn("no picture: out of memory")
            return
        for name, picture in pictures.items():
            path = self.run.preview(self.state.step, name)
            try:
                save_png(path, picture)
            except ResourceError as error:
                self.warn(error.message)
                return
            self.recorder.emit(PreviewSaved(step=self.state.step, path=str(path.relative_to(self.run.root))))

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint is due apart from the steps: asked for, or `train.checkpoint_minutes` have passed."""
        minutes = self.config.train.checkpoint_minutes
        return self._save_requested or (minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, *, final: bool) -> None:
        """Copy the state and let it be written as a checkpoint, which is noted if it is the best. Old ones go.

        Args:
            final: nothing comes after this one, so it is waited for and failing to write it is an error.

        Raises:
            DivergedError: a weight is not finite.
            ResourceError: a write failed, and this was the final one or the third failure in a row.
        """
        if not self.ranks.first:
            return
        start = time.monotonic()
        self.settle(wait=True)
        self._save_requested, self._saved_at = False, start
        self.recorder.sync()
        with self._interrupted("checkpoint"):
            self.writer.start(take_snapshot(self.state, self.config, self.task))
            self._stall_s = time.monotonic() - start
            if final:
                self.settle(wait=True, final=True)

    def settle(self, *, wait: bool = False, final: bool = False) -> None:
        """Report what became of the last checkpoint, if that is known by now.

        Raises:
            ResourceError: see `save`.
        """
        written = self.writer.collect(wait=wait)
        if written is None:
            return
        if isinstance(written.outcome, ResourceError):
            self._count_failed_save(written.step, written.outcome, final)
            return
        self._failed_saves = 0
        for message in written.warnings:
            self.warn(message)
        path = str(written.outcome.relative_to(self.run.root))
        self.recorder.emit(
            CheckpointSaved(step=written.step, path=path, seconds=written.seconds, stall_s=self._stall_s)
        )

    def warn(self, message: str) -> None:
        """Record something that the user should know."""
        self.recorder.emit(Warned(step=self.state.step, message=message))

    def take_requests(self) -> None:
        """Acknowledge and remove requests in control/; they are met after the step under way. Safe in any thread."""
        for name in REQUESTS:
            try:
                (self.run.control / name).unlink()
            except OSError:
                continue
            self.recorder.emit(RequestTaken(step=self.state.step, request=name))
            if name == CHECKPOINT:
                self._save_requested = True
            elif name == STOP:
                self.stop.request(by="request")

    def _log_event(self, event: Event) -> None:
        text = line(event, self.config.train.steps)
        if text:
            _log.info("%s", text)

    def _monitored(self) -> contextlib.AbstractContextManager[object]:
        """Samples the machine and takes requests while its block runs, however long a step takes."""
        if not self.ranks.first:
            return contextlib.nullcontext()
        return Monitor(
            Card(self.choice.device),
            step=lambda: self.state.step,
            emit=self.recorder.emit,
            take_requests=self.take_requests,
            folder=self.run.root,
        )

    def _judge(self, means: Means) -> None:
        """Warn of skipped steps and jumps of the loss; end a run that has too many bad steps."""
        train, health = self.config.train, self.state.health
        reason = health.too_many_skipped(means, train, overflows_expected=self.state.scaler.is_enabled())
        if reason:
            self.settle(wait=True)
            last = next(iter(self.run.checkpoint_steps()), None)
            kept = f"the checkpoint of step {last} is untouched" if last is not None else "there is no checkpoint yet"
            raise DivergedError(
                f"{reason}, up to step {self.state.step} ({self._samples(means)}); {kept}",
                "lower optim.lr, lengthen optim.warmup_steps, or check the data",
            )
        if means.skipped_in_window:
            count = means.skipped_in_window
            self.warn(
                f"{count} step{'s' if count > 1 else ''} with a non-finite loss or gradient skipped "
                f"(weights unchanged, {means.skipped} so far)"
            )
        loss = means.losses.get("loss", float("nan"))
        usual = health.jump(loss, train.spike_factor)
        if usual is not None:
            self.warn(
                f"the loss jumped to {loss:.4g}; its median before was {usual:.4g} ({self._samples(means)}). If it "
                "does not come back, begin a new run from an earlier checkpoint (--init-from) with a lower optim.lr"
            )

    def _samples(self, means: Means) -> str:
        """The samples of the window, for a search for bad data."""
        size, last = self.config.train.batch_size, self.state.step
        first = max(0, last - means.steps) * size
        describe = getattr(self.task.dataset, "describe", None)
        source = f", the first from {describe(first)}" if describe is not None else ""
        return f"samples {first} to {last * size - 1}{source}"

    def _is_best(self, found: Evaluation) -> bool:
        finite_score = found.score == found.score and abs(found.score) != float("inf")
        return finite_score and (self.state.best is None or found.score > self.state.best[1])

    def _count_failed_save(self, step: int, error: ResourceError, final: bool) -> None:
        self._failed_saves += 1
        # The best one is what best.json says: a score without its checkpoint is of no use.
        if self.state.best is not None and self.state.best[0] == step:
            record = self.run.read_json(self.run.best)
            self.state.best = (int(record["step"]), float(record["value"])) if "value" in record else None
        if final or self._failed_saves >= MAX_FAILED_SAVES:
            raise error
        self.warn(f"no checkpoint of step {step}: {error.message}; {error.hint}")

    @contextlib.contextmanager
    def _evaluating(self, kind: str) -> Iterator[None]:
        self.state.model.eval()
        try:
            with self._interrupted(kind), torch.no_grad(), self.choice.autocast():
                yield
        finally:
            self.state.model.train()

    @contextlib.contextmanager
    def _interrupted(self, kind: str) -> Iterator[None]:
        # Queued steps are finished first, or their time would be counted as that of the interruption.
        if self.choice.device.type == "cuda":
            torch.cuda.synchronize(self.choice.device)
        with self.watch.interrupted(kind):
            yield

    # ---- the end

    def finish(self) -> None:
        """Wait for rank 0's last checkpoint; raises Interrupted when the run was stopped before its last step."""
        self.ranks.wait()
        step, total = self.state.step, self.config.train.steps
        if step < total:
            raise Interrupted(
                f"by {self.stop.reason or 'request'} at step {step} of {total}, with a checkpoint",
                f"continue with: affmae {self.task.name} --resume {self.run.root}",
                signal_number=self.stop.signal_number or 2,
            )

    @contextlib.contextmanager
    def _end_recorded(self) -> Iterator[None]:
        """Whatever ends the block is recorded in a last event and in summary.json."""
        lost = peer_lost_error().message
        try:
            with self.ranks.at_forced_end(lambda: self._record_end("failed", lost)):
                yield
        except torch.OutOfMemoryError as error:
            self._record_end("failed", "out of memory")
            raise ResourceError(f"out of memory at step {self.state.step}", _LESS_MEMORY) from error
        except Interrupted as error:
            self._record_end("stopped", error.message)
            raise
        except BaseException as error:
            known = of_system(error) if isinstance(error, OSError) else error
            self._record_end("failed", known.message if isinstance(known, AffmaeError) else repr(error))
            if not isinstance(error, AffmaeError):
                _log.exception("the run failed")
            raise
        self._record_end("finished", "")

    def _record_end(self, status: str, message: str) -> None:
        if not self.ranks.first:
            return
        try:
            self.settle(wait=True)  # a checkpoint that is being written still counts
        except ResourceError as error:
            _log.error("%s", error.message)
        self.recorder.emit(RunEnded(step=self.state.step, status=status, seconds=self.watch.seconds, message=message))
        self.recorder.sync()
        try:
            atomic.commit_json(self.run.summary, finite(asdict(self.summary(status, message))))
        except ResourceError as error:
            _log.error("%s", error.message)

    def summary(self, status: str, message: str = "") -> Summary:
        """The run as it stands."""
        state = self.state
        best_step, best_score = state.best or (None, None)
        return Summary(
            status=status,
            step=state.step,
            total_steps=self.config.train.steps,
            seconds=self.watch.seconds,
            metrics=state.metrics,
            best_step=best_step,
            best_score=best_score,
            message=message,
        )


def _pieces(micro: int, share: int) -> str:
    times = share // micro
    return f"{micro} image{'s' if micro > 1 else ''} at a time, {times} time{'s' if times > 1 else ''} a step"
