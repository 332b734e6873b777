"""Micro-batches: how many images go through the network at once, and what happens when they do not fit.

Accumulation over micro-batches gives the gradients of the whole batch, up to rounding, so their size is a matter of
memory and speed alone. It always divides a process's share of the batch.
"""

from __future__ import annotations

import gc

import torch

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


def largest_divisor(share: int, limit: int) -> int:
    """The largest micro-batch of at most `limit` (at least 1) that divides `share`."""
    return next(size for size in range(min(share, max(1, limit)), 0, -1) if share % size == 0)


def free_memory(device: torch.device) -> None:
    """Give back what the allocator keeps. Call it outside an except block: an exception in flight holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
