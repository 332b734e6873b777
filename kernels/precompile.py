"""Compile the Triton kernels that a computation needs, in parallel and before it runs.

`rehearse` runs any computation built from this package's operations on meta tensors: shapes and dtypes are real, there
is no data. Every kernel launch inside is turned into a compilation for the current GPU, on a pool of threads. Triton
keeps the results in its cache folder, so a later process only loads them. Nothing has to list the kernels, and a
kernel that a configuration does not use is not compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_rehearsing = False


def rehearsing() -> bool:
    """Whether kernel launches are compiled instead of run (see `rehearse`)."""
    return _rehearsing


@dataclass(frozen=True)
class _Pointer:
    """Stands for a tensor argument: Triton specializes on its dtype and on whether its address is a multiple of 16."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    @staticmethod
    def ptr_range() -> int:
        return 0

    @classmethod
    def of(cls, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return cls(argument.dtype, int(argument.storage_offset()) * argument.element_size())


def rehearse(computation: Callable[[], object], *, workers: int | None = None) -> list[Any]:
    """Compile every kernel that `computation` launches.

    Args:
        computation: builds its tensors on the meta device; forward and backward passes alike. It runs at once, in this
            thread; the operations choose their Triton kernels.
        workers: compiler threads; None: one per core.

    Returns:
        Triton's compiled kernels, each once, in the order of their first launch.

    Raises:
        Exception: whatever Triton raises when a kernel does not compile.
    """
    from triton.runtime._async_compile import AsyncCompileMode, FutureKernel

    found: list[Any] = []
    with (
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "compile") as pool,
        AsyncCompileMode(pool),
        _launches_compile(found),
    ):
        computation()
    # What was still being compiled when it was launched stands in the list as a future.
    kernels = [kernel.result() if isinstance(kernel, FutureKernel) else kernel for kernel in found]
    return list({id(kernel): kernel for kernel in kernels}.values())


@contextmanager
def _launches_compile(found: list[Any]) -> Iterator[None]:
    """Inside, `kernel[grid](...)` compiles and appends the result to `found`."""
    from triton.runtime.jit import JITFunction

    global _rehearsing
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = {name: _Pointer.of(value) for name, value in kwargs.items()}
        kernel = launch(self, *map(_Pointer.of, args), grid=grid, warmup=True, **named)
        found.append(kernel)
        return kernel

    JITFunction.run = compile_only
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False
        JITFunction.run = launch
