"""One optimizer step: forward and backward of every micro-batch, clipping, update. Nothing here waits for the device.

A step with a non-finite loss or gradient is left out without a branch: the fused AdamW reads the flag on the device
and leaves weights and moments as they are, bit for bit. Clipping is the factor that the same kernel divides by. The
cost of the check is one norm, which clipping needs anyway, and a handful of scalar kernels.

A step that runs out of memory has changed nothing: it raises, and the trainer repeats it in smaller pieces. Several
processes agree on that after the last backward pass, before they sum their gradients in one collective.

On request, everything after the batch's copy is captured once as two CUDA graphs and replayed: the pass of a
micro-batch, and the update. So the host launches two graphs a step instead of thousands of kernels; between the two,
several processes sum their gradients. The captured functions are the same that run before, so the numbers do not
change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine.errors import ResourceError, one_line
from affmae_engine.runtime.cuda_graphs import CudaGraphedFunction
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.runtime.distributed import Ranks, SumOverRanks
from affmae_engine.runtime.memory import as_out_of_memory
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import GpuAdamW

Losses = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
Finish = Callable[[dict[str, Tensor]], dict[str, Tensor]]

EAGER_STEPS = 3
"""Steps before the capture: they compile kernels, find the largest workspaces and move constants to the device."""

_LESS = "continue with --resume and a smaller train.micro_batch"


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device: losses averaged over the batch, gradient norm before clipping, whether it was skipped.

    They are overwritten by the next step, so whoever keeps them copies them.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    bad: Tensor


def seed_forward(seed: int, step: int, rank: int, part: int) -> None:
    """Seed torch's generators (dropout, drop path) for one forward pass, so that a resumed run repeats it exactly.

    Called after the batch is there: starting the data loader draws from the same generator.
    """
    words = np.random.SeedSequence([seed, step, rank, part]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class TrainStep:
    """Takes optimizer steps, each over `accumulate` micro-batches.

    Args:
        model: on the device, in train mode.
        losses: the task's loss function.
        optimizer: fused AdamW, from `build_adamw`.
        scaler: loss scaler; disabled unless the precision is fp16.
        choice: device and precision.
        accumulate: micro-batches per step.
        clip_norm: largest gradient norm; 0 turns clipping off.
        record: replay CUDA graphs after `EAGER_STEPS` steps; every batch must then have the same shapes.
        ranks: the processes that share a step.
        agree: called once per step with whether this process ran out of memory; returns whether any did.
        finish: makes training samples of a batch once it is on the device; None: the loader gives samples.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        optimizer: torch.optim.AdamW,
        scaler: torch.amp.GradScaler,
        choice: DeviceChoice,
        *,
        accumulate: int,
        clip_norm: float,
        record: bool = False,
        ranks: Ranks = Ranks(),
        agree: Callable[[bool], bool] = bool,
        finish: Finish | None = None,
    ) -> None:
        self._model, self._losses, self._optimizer, self._scaler = model, losses, optimizer, scaler
        self._choice, self._accumulate, self._clip_norm = choice, accumulate, clip_norm
        self._ranks, self._agree = ranks, agree
        self._parts = accumulate * ranks.world
        self._to_device = DevicePrefetcher(choice.device, finish)
        self._eager_steps = EAGER_STEPS if record else None
        # Not the functions themselves until then: a step that refers to itself would keep the optimizer alive.
        self._graphed_backward: CudaGraphedFunction | None = None
        self._graphed_update: CudaGraphedFunction | None = None
        self._written: list[Tensor] = []  # the gradients that the captured pass writes
        self._sum: SumOverRanks | None = None

    def __call__(
        self, batches: Iterator[dict[str, Tensor]], *, seed: Callable[[int], None], watch: Stopwatch
    ) -> StepResult:
        """Take one step.

        Args:
            batches: micro-batches on the host.
            seed: called before the forward pass of each micro-batch with its number.
            watch: told how long the device waited for data.

        Raises:
            torch.OutOfMemoryError: here or in another process; nothing was changed, and no tensor of the failed pass
                is kept alive by the exception.
            ResourceError: memory ran out where the step cannot be repeated, in the update.
        """
        losses: dict[str, Tensor] = {}
        shortage: torch.OutOfMemoryError | None = None
        try:
            # Add up the gradients of all micro-batches.
            for part in range(self._accumulate):
                batch = self._to_device(_next_batch(batches, self._choice.device, watch))
                if part == 0 and self._eager_steps == 0:
                    self._capture(batch)
                seed(part)
                shares = (self._graphed_backward or self._backward)(batch)
                if part == 0:  # a copy, where a replayed pass will overwrite its results with those of the next
                    losses = {n: share.clone() for n, share in shares.items()} if self._accumulate > 1 else shares
                else:
                    losses = {name: total + shares[name] for name, total in losses.items()}
            if self._ranks.world > 1 and self._sum is None:
                self._sum = SumOverRanks([*self._gradients(), *losses.values()])
        except Exception as error:
            shortage = as_out_of_memory(error)
            if shortage is None:
                raise
        # Not in the except block: an exception that is raised there keeps the tensors of the failed pass alive.
        if self._agree(shortage is not None) and shortage is None:
            shortage = torch.OutOfMemoryError("out of memory in another process")
        if shortage is not None:
            self._optimizer.zero_grad(set_to_none=True)
            raise shortage

        if self._sum is not None:
            losses = self._sum_over_ranks(self._sum, losses)
        try:
            update = (self._graphed_update or self._update)({"loss": losses["loss"]})
        except torch.OutOfMemoryError as error:  # a part of the weights may be updated already
            raise ResourceError(
                "out of memory while the weights were updated",
                "continue with --resume and a smaller train.micro_batch",
            ) from error
        if self._eager_steps is not None:
            self._eager_steps -= 1
        return StepResult(losses, update["norm"], update["bad"])

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch, on the device; returns its share of the mean losses."""
        with self._choice.autocast():
            named = self._losses(self._model, batch)
        self._scaler.scale(self._share(named["loss"])).backward()
        return {name: self._share(value.detach().float()) for name, value in named.items()}

    def _share(self, loss: Tensor) -> Tensor:
        """What a micro-batch's mean contributes to that of the step, over all processes."""
        return loss / self._parts if self._parts > 1 else loss

    def _sum_over_ranks(self, add_up: SumOverRanks, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums gradients, for the update to read, and losses over all processes."""
        written = self._written or self._gradients()
        with self._ranks.peers_expected():
            sums = add_up([*written, *losses.values()])
        if self._written and self._accumulate > 1:  # the captured pass adds to them
            torch._foreach_zero_(self._written)
        if not self._written:
            self._read_gradients_from(sums)
        return dict(zip(losses, sums[len(written) :], strict=True))

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained() if p.grad is not None]

    def _read_gradients_from(self, tensors: Sequence[Tensor]) -> None:
        """Let the update read these as the parameters' gradients."""
        for parameter, tensor in zip(self._trained(), tensors, strict=False):  # losses follow the gradients
            parameter.grad = tensor

    def _update(self, total: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips and updates, unless something is not finite; forgets the gradients."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        grads = self._gradients()
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        # x - x is 0 for a finite x and NaN otherwise: four small kernels, where `isfinite` takes four for each tensor.
        both = norm + total["loss"]
        bad = both - both != 0
        scale = (norm / self._clip_norm).clamp(min=1.0) if self._clip_norm else torch.ones_like(norm)
        self._optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()
        # A captured backward pass writes into the very tensors it was captured with: one micro-batch overwrites them,
        # several add to them.
        if self._eager_steps is None or self._eager_steps > 0:
            self._optimizer.zero_grad(set_to_none=True)
        elif self._accumulate > 1 and self._sum is None:
            torch._foreach_zero_(grads)
        return {"norm": norm, "bad": bad}

    def _capture(self, batch: dict[str, Tensor]) -> None:
        """Captures the pass of a micro-batch and the update as CUDA graphs; runs neither."""
        if self._accumulate > 1:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        pool = torch.cuda.graph_pool_handle()
        try:
            backward = CudaGraphedFunction(self._backward, batch, pool)
            if self._sum is not None:
                self._written = self._gradients()
                self._read_gradients_from(self._sum.results)
            if isinstance(self._optimizer, GpuAdamW):
                self._optimizer.prepare()  # the gradients are where the update will find them
            loss = torch.zeros((), device=self._choice.device)
            self._graphed_update = CudaGraphedFunction(self._update, {"loss": loss}, pool)
            self._graphed_backward = backward
        except RuntimeError as error:
            if as_out_of_memory(error) is not None:
                if self._scaler.is_enabled():
                    # Capturing the update may have ended between unscaling and its end: what the scaler noted of that
                    # is dropped, or it would refuse the step that is repeated. Its scale stays.
                    self._scaler.update(self._scaler.get_scale())
                raise
            raise ResourceError(
                f"the training step could not be captured as CUDA graphs: {one_line(error)}",
                "go on with --resume, or begin again, with --set kernels.cuda_graph=false; the result stays the same",
            ) from error


def _next_batch(batches: Iterator[dict[str, Tensor]], device: torch.device, watch: Stopwatch) -> dict[str, Tensor]:
    """The next batch. The time it takes counts as waiting only if the device has run out of work meanwhile."""
    queued = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    start = time.monotonic()
    batch = next(batches)
    if queued is None or queued.query():
        watch.waited(time.monotonic() - start)
    return batch


class DevicePrefetcher:
    """Copies batches to the device and finishes them; on a GPU beside the steps before, on a stream of its own."""

    def __init__(self, device: torch.device, finish: Finish | None = None) -> None:
        self._device, self._finish = device, finish
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stream is None:
            return self._finished({name: tensor.to(self._device) for name, tensor in batch.items()})
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = self._finished({name: t.to(self._device, non_blocking=True) for name, t in batch.items()})
        compute.wait_stream(self._stream)
        for tensor in moved.values():
            tensor.record_stream(compute)  # its memory is not given to the next batch while it is still read
        return moved

    def _finished(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch if self._finish is None else self._finish(batch)
