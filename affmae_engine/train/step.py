"""One optimizer step: forward and backward of every micro-batch, clipping, update. Nothing here waits for the device.

A step with a non-finite loss or gradient is left out without a branch: the fused AdamW reads the flag on the device
and leaves weights and moments as they are, bit for bit. Clipping is the factor that the same kernel divides by. The
cost of the check is one norm, which clipping needs anyway, and a handful of scalar kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine.train.device import DeviceChoice
from affmae_engine.train.metrics import Stopwatch

Losses = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device: losses averaged over the micro-batches, gradient norm before clipping, step skipped."""

    losses: dict[str, Tensor]
    grad_norm: Tensor
    bad: Tensor


def seed_forward(seed: int, step: int, rank: int, part: int) -> None:
    """Seed torch's generators (dropout, drop path) for one forward pass, so that a resumed run repeats it exactly.

    Called after the batch is there: starting the data loader draws from the same generator.
    """
    words = np.random.SeedSequence([seed, step, rank, part]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def train_step(
    model: nn.Module,
    losses: Losses,
    batches: Iterator[dict[str, Tensor]],
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    choice: DeviceChoice,
    *,
    accumulate: int,
    clip_norm: float,
    seed: Callable[[int], None],
    watch: Stopwatch,
) -> StepResult:
    """Take one optimizer step over `accumulate` micro-batches.

    Args:
        model: on the device, in train mode.
        losses: the task's loss function.
        batches: micro-batches on the host.
        optimizer: fused AdamW whose learning rates are set.
        scaler: loss scaler; disabled unless the precision is fp16.
        choice: device and precision.
        accumulate: micro-batches per step.
        clip_norm: largest gradient norm; 0 turns clipping off.
        seed: called before the forward pass of each micro-batch with its number.
        watch: told how long the device waited for data.
    """
    sums: dict[str, Tensor] = {}
    for part in range(accumulate):
        batch = _to_device(_next_batch(batches, choice.device, watch), choice.device)
        seed(part)
        with choice.autocast():
            named = losses(model, batch)
        scaler.scale(named["loss"] / accumulate).backward()
        for name, value in named.items():
            share = value.detach().float() / accumulate
            sums[name] = sums[name] + share if name in sums else share
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    bad = ~(torch.isfinite(norm) & torch.isfinite(sums["loss"]))
    optimizer.grad_scale = (norm / clip_norm).clamp(min=1.0) if clip_norm else torch.ones_like(norm)  # type: ignore[attr-defined]
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.step()
    if scaler.is_enabled():
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums, norm, bad)


def _next_batch(batches: Iterator[dict[str, Tensor]], device: torch.device, watch: Stopwatch) -> dict[str, Tensor]:
    """The next batch. The time it takes counts as waiting only if the device has run out of work meanwhile."""
    queued = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    start = time.monotonic()
    batch = next(batches)
    if queued is None or queued.query():
        watch.waited(time.monotonic() - start)
    return batch


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
