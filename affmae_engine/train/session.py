"""One process's work on a run, apart from the steps themselves: log, evaluate, preview, save, and requests to stop.

Of several processes the first one does all of it. The others read their (equal) means when a step is logged, so that
they come to the same judgement, and wait for the first at their next step.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from affmae_engine import checkpoint
from affmae_engine.config import RunConfig
from affmae_engine.errors import DivergedError, ResourceError, human_bytes
from affmae_engine.events import CheckpointSaved, Evaluated, PreviewSaved, RequestTaken, StepLogged, Warned
from affmae_engine.picture_files import save_png
from affmae_engine.run_dir import CHECKPOINT, REQUESTS, STOP, RunDir
from affmae_engine.runtime.device import DeviceChoice, memory_gib
from affmae_engine.runtime.distributed import Ranks
from affmae_engine.runtime.gpu_stats import Card
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train.metrics import Means, Recorder, Stopwatch
from affmae_engine.train.monitor import Monitor
from affmae_engine.train.saving import Writer
from affmae_engine.train.state import TrainState, take_snapshot
from affmae_engine.train.task import Evaluation, Task

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail (disk full) before the run stops."""

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """What the loop calls after a step. Every method works on `state.step`."""

    run: RunDir
    config: RunConfig
    task: Task
    choice: DeviceChoice
    state: TrainState
    recorder: Recorder
    stop: StopRequest
    watch: Stopwatch
    ranks: Ranks = field(default_factory=Ranks)
    failed_saves: int = 0
    save_requested: bool = False
    _stop_agreed: bool = False
    _stall_s: float = 0.0
    _saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.writer = Writer(self.run, self.config.train.keep_checkpoints)

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this step; several processes agreed on it during the step."""
        return self._stop_agreed if self.ranks.world > 1 else self.stop.requested

    def agree(self, out_of_memory: bool) -> bool:
        """Once a step: whether any process ran out of memory. Requests to stop are agreed on along the way."""
        failed, self._stop_agreed = self.ranks.any(out_of_memory, self.stop.requested)
        return failed

    def log(self, rate: float) -> None:
        """Read the device, record the means since the last log, obey requests in control/.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        means = self.state.window.read()
        train = self.config.train
        pace = self.watch.lap(train.batch_size, train.steps - self.state.step)
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
                eta_s=pace.eta_s,
                skipped=means.skipped,
            )
        )
        self._judge(means)
        if self.ranks.first:
            self.take_requests()

    def evaluate(self) -> None:
        """Held-out figures; a best one asks for a checkpoint."""
        if not self.ranks.first:
            return
        start = time.monotonic()
        with self._evaluating():
            found = self.task.evaluate(self.state.model, self.choice.device)
        best = self._is_best(found)
        if best:
            self.state.best = (self.state.step, found.score)
            self.save_requested = True
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

    def preview(self) -> None:
        """Write the task's pictures. A full disk or a full card costs the picture, not the run."""
        if not self.ranks.first:
            return
        try:
            with self._evaluating():
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
        return self.save_requested or (minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes)

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
        self.save_requested, self._saved_at = False, start
        self.recorder.sync()
        with self._aside():
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
            self._failed_save(written.step, written.outcome, final)
            return
        self.failed_saves = 0
        for message in written.warnings:
            self.warn(message)
        path = str(written.outcome.relative_to(self.run.root))
        self.recorder.emit(
            CheckpointSaved(step=written.step, path=path, seconds=written.seconds, stall_s=self._stall_s)
        )

    def warn(self, message: str) -> None:
        """Record something that the user should know."""
        self.recorder.emit(Warned(step=self.state.step, message=message))

    def reconcile(self) -> None:
        """After a restore: put aside what is newer than the state (damaged), and make best.json agree with it."""
        for path in checkpoint.set_aside_newer(self.run, self.state.step):
            self.warn(f"a damaged checkpoint was renamed to {path.name}; delete it when you no longer need it")
        best = self.state.best
        if best is None or not self.run.checkpoint(best[0]).is_dir():
            self.run.best.unlink(missing_ok=True)
            self.state.best = None
        elif checkpoint.best_step(self.run) != best[0]:
            checkpoint.write_best(self.run, best[0], "score", best[1])

    def check_space(self) -> None:
        """Raises ResourceError when the disk cannot hold the checkpoints of this run."""
        tensors = self.state.model.state_dict().values()
        one = 3 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # weights and two moments
        have = len(self.run.checkpoint_steps())
        needed = one * max(1, self.config.train.keep_checkpoints + 2 - have)
        free = shutil.disk_usage(self.run.root).free
        if free < needed:
            raise ResourceError(
                f"the checkpoints of this run need {human_bytes(needed)}, and {self.run.root} has "
                f"{human_bytes(free)} left",
                "free some space, choose another -o/--out, or keep fewer with --set train.keep_checkpoints=1",
            )

    def clear_requests(self) -> None:
        """Drop requests that an earlier process left behind."""
        for name in REQUESTS:
            (self.run.control / name).unlink(missing_ok=True)

    def take_requests(self) -> None:
        """Acknowledge and remove requests in control/; they are met after the step under way. Safe in any thread."""
        for name in REQUESTS:
            if not _taken(self.run, name):
                continue
            self.recorder.emit(RequestTaken(step=self.state.step, request=name))
            if name == CHECKPOINT:
                self.save_requested = True
            elif name == STOP:
                self.stop.request(by="request")

    def monitor(self) -> contextlib.AbstractContextManager[object]:
        """Samples the machine and takes requests while its block runs, however long a step takes."""
        if not self.ranks.first:
            return contextlib.nullcontext()
        return Monitor(
            Card(self.choice.device),
            step=lambda: self.state.step,
            emit=self.recorder.emit,
            take_requests=self.take_requests,
        )

    def _judge(self, means: Means) -> None:
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
        finite = found.score == found.score and abs(found.score) != float("inf")
        return finite and (self.state.best is None or found.score > self.state.best[1])

    def _failed_save(self, step: int, error: ResourceError, final: bool) -> None:
        self.failed_saves += 1
        # The best one is what best.json says: a score without its checkpoint is of no use.
        if self.state.best is not None and self.state.best[0] == step:
            record = self.run.read_json(self.run.best)
            self.state.best = (int(record["step"]), float(record["value"])) if "value" in record else None
        if final or self.failed_saves >= MAX_FAILED_SAVES:
            raise error
        self.warn(f"no checkpoint of step {step}: {error.message}; {error.hint}")

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.state.model.eval()
        try:
            with self._aside(), torch.no_grad(), self.choice.autocast():
                yield
        finally:
            self.state.model.train()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        # Queued steps are finished first, or their time would be counted as evaluation.
        if self.choice.device.type == "cuda":
            torch.cuda.synchronize(self.choice.device)
        with self.watch.aside():
            yield


def _taken(run: RunDir, name: str) -> bool:
    try:
        (run.control / name).unlink()
    except OSError:
        return False
    return True
