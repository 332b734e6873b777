"""Compile the Triton kernels that a computation needs, in parallel and before it runs.

`rehearse` runs any computation built from this package's operations on meta tensors: shapes and dtypes are real, there
is no data. Kernel launches inside are noted instead of made; then forked processes compile what was noted, each its
share, into Triton's cache folder, from which this process (and every later one) loads them. Nothing has to list the
kernels, and a kernel that a configuration does not use is not compiled.

Processes, because a third of Triton's work is Python; forked, because importing PyTorch and Triton anew would take
longer than compiling. They touch no GPU and end without running any exit handler.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PATIENCE_S = 120.0
"""Seconds that a compiling process may take; what it has not done by then is compiled in the caller's process."""

_rehearsing = False


def rehearsing() -> bool:
    """Whether kernel launches are noted instead of made (see `rehearse`)."""
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
        return cls(argument.dtype, int(argument.storage_offset()) * argument.element_size() % 16)


@dataclass(frozen=True)
class _Launch:
    """A launch without its grid and its data."""

    kernel: Any
    arguments: dict[str, Any]

    def compile(self) -> Any:
        """Triton's compiled kernel, from its cache where it is there."""
        return type(self.kernel).run(self.kernel, grid=(1,), warmup=True, **self.arguments)

    def key(self) -> tuple[Any, ...]:
        """Equal for launches that Triton compiles to one kernel."""
        constants = {parameter.name: parameter.is_constexpr for parameter in self.kernel.params}
        return id(self.kernel), *(
            (name, value if constants.get(name, True) else _specialized(value))
            for name, value in sorted(self.arguments.items())
        )


def rehearse(computation: Callable[[], object], *, workers: int | None = None) -> list[Any]:
    """Compile every kernel that `computation` launches, for the current GPU.

    Args:
        computation: builds its tensors on the meta device; forward and backward passes alike. It runs at once, in this
            thread; the operations choose their Triton kernels. Launches pass their arguments by name.
        workers: processes; None: one per core; 1: compile in this process.

    Returns:
        Triton's compiled kernels, each once, in the order of their first launch.

    Raises:
        Exception: whatever Triton raises when a kernel does not compile.
    """
    launches: dict[tuple[Any, ...], _Launch] = {}
    with _noting(launches):
        computation()
    jobs = list(launches.values())
    workers = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(jobs))
    if workers > 1:
        _compile_aside(jobs, workers)
    # What the processes compiled is in the cache by now; what they could not raises here.
    return list({id(kernel): kernel for kernel in (job.compile() for job in jobs)}.values())


def _compile_aside(jobs: list[_Launch], workers: int) -> None:
    """Compiles the jobs in forked processes. Their faults show when this process compiles what is missing."""
    from triton.runtime import driver

    target = driver.active.get_current_target()
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_compile_share, args=(jobs[i::workers], target), daemon=True) for i in range(workers)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside other threads
        for process in processes:
            process.start()
    for process in processes:
        process.join(PATIENCE_S)
        process.kill()


def _compile_share(jobs: list[_Launch], target: Any) -> None:
    from triton.runtime import driver

    driver.set_active(_Target(target))  # a forked process must not ask CUDA
    try:
        for job in jobs:
            job.kernel.device_caches.clear()
            job.compile()
    finally:
        os._exit(0)


class _Target:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, target: Any) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@contextmanager
def _noting(launches: dict[tuple[Any, ...], _Launch]) -> Iterator[None]:
    """Inside, `kernel[grid](...)` adds to `launches` and does nothing else."""
    from triton.runtime.jit import JITFunction

    global _rehearsing
    run = JITFunction.run

    def note(self: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        launch = _Launch(self, {name: _Pointer.of(value) for name, value in arguments.items()})
        launches.setdefault(launch.key(), launch)

    JITFunction.run = note
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False
        JITFunction.run = run


def _specialized(value: Any) -> Any:
    """What Triton looks at in an argument that is no constant."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % 16 == 0, value.bit_length() > 31
    return type(value) if isinstance(value, float) else value
