"""Micro-batches: how many images go through the network at once, and what happens when they do not fit.

Accumulation over micro-batches gives the gradients of the whole batch, up to rounding and to what dropout draws, so
their size is a matter of memory and speed alone. It always divides a process's share of the batch.

Unusual: the size that fits a card is measured, not estimated: forward and backward passes of a few sizes on real
samples, which change no weight and no random generator. A line through what they took leads to the size, so the card
is hardly ever driven out of memory, which others on a desktop would feel. The passes are neither compiled nor recorded;
should the training need more than they did, the trainer halves as at any shortage.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from affmae_engine.runtime.device import DeviceChoice

HEADROOM = 0.1
"""Share of a card's memory that is left to others, ..."""
LEAST_HEADROOM = 1 << 30
"""... but at least so many bytes."""
ON_CPU = 8
"""`auto` without a card, where larger micro-batches bring no speed."""

_FIRST_LOOK = 4
_T = TypeVar("_T")
_SAYS_SO = ("out of memory", "can't allocate memory")


def out_of_memory(error: BaseException) -> BaseException | None:
    """The out-of-memory error behind an exception, if there is one: compiler and autograd wrap it at times."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return seen
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _SAYS_SO):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def as_out_of_memory(error: BaseException) -> torch.OutOfMemoryError | None:
    """A new out-of-memory error with the text of the one behind an exception; None when there is none.

    Raised outside the except block, it holds none of the tensors of what failed, which the exception itself does.
    """
    reason = out_of_memory(error)
    return None if reason is None else torch.OutOfMemoryError(str(reason))


def largest_divisor(share: int, limit: int) -> int:
    """The largest micro-batch of at most `limit` (at least 1) that divides `share`."""
    return next(size for size in range(min(share, max(1, limit)), 0, -1) if share % size == 0)


def free_memory(device: torch.device) -> None:
    """Give back what the allocator keeps. Call it outside an except block: an exception in flight holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measured_micro_batch(
    model: nn.Module,
    losses: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
    sample: dict[str, Tensor],
    choice: DeviceChoice,
    share: int,
    *,
    extra: int = 0,
) -> int:
    """The largest micro-batch that fits the card's free memory, with `HEADROOM` left.

    Args:
        model: on the device, in train mode, its optimizer's state allocated; gradients are None before and after.
        losses: the task's.
        sample: one training sample, on the host.
        choice: device and precision.
        share: images of a step in this process; the result divides it.
        extra: bytes that the training needs besides.
    """
    if choice.device.type != "cuda":
        return largest_divisor(share, ON_CPU)

    def peak(size: int) -> int | None:
        """Bytes that the allocator holds for one pass; None when it did not fit."""
        free_memory(choice.device)
        torch.cuda.reset_peak_memory_stats(choice.device)
        try:
            batch = {
                name: tensor.to(choice.device).expand(size, *tensor.shape).contiguous()
                for name, tensor in sample.items()
            }
            with choice.autocast():
                loss = losses(model, batch)["loss"]
            loss.backward()
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            return None
        finally:
            model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_reserved(choice.device)

    with torch.random.fork_rng(devices=[choice.device]):
        peak(1)  # loads kernels and makes workspaces, which stay
        free_memory(choice.device)
        free, total = torch.cuda.mem_get_info(choice.device)
        budget = free + torch.cuda.memory_reserved(choice.device) - max(int(HEADROOM * total), LEAST_HEADROOM) - extra
        size = largest_that_fits(share, peak, budget)
    free_memory(choice.device)
    torch.cuda.reset_peak_memory_stats(choice.device)  # the peak that is logged is that of the training
    return size


def largest_that_fits(share: int, peak: Callable[[int], int | None], budget: int) -> int:
    """The largest divisor of `share` whose `peak` (None: out of memory) is within `budget`; 1 when none is.

    A line through the smallest and the largest size that fitted says which one to try next.
    """
    smallest = peak(1)
    if smallest is None or smallest > budget:
        return 1
    lower, upper, slope = 1, share + 1, 0.0
    while True:
        between = [size for size in range(lower + 1, upper) if share % size == 0]
        if lower == 1:
            tried = [size for size in between if size >= _FIRST_LOOK][:1] or between[-1:]
            if upper <= share:  # a size that is larger did not fit
                tried = between[-1:]
        else:
            tried = [size for size in between if smallest + slope * (size - 1) <= budget][-1:]
        if not tried:
            return lower
        used = peak(tried[0])
        if used is None or used > budget:
            upper = tried[0]
        else:
            lower, slope = tried[0], (used - smallest) / (tried[0] - 1)


def in_smaller_batches(work: Callable[[int], _T], size: int, device: torch.device) -> _T:
    """`work(size)`, where `size` is halved as often as memory runs out.

    Raises:
        torch.OutOfMemoryError: even for a size of 1.
    """
    while True:
        try:
            return work(size)
        except Exception as error:
            shortage = as_out_of_memory(error)
            if shortage is None:
                raise
        free_memory(device)
        if size == 1:
            raise shortage
        size //= 2
