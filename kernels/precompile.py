"""Compile the Triton kernels that a computation needs, in parallel and before it runs.

`rehearse` runs any computation built from this package's operations on meta tensors: shapes and dtypes are real, there
is no data. Kernel launches inside are noted instead of made; then forked processes compile what was noted, each its
share, into Triton's cache folder, from which this process (and every later one) loads them. Nothing has to list the
kernels, and a kernel that a configuration does not use is not compiled.

Processes, because a third of Triton's work is Python; forked, because importing PyTorch and Triton anew would take
longer than compiling. They touch no GPU, nor anything that another thread of this process may have locked, such as
stdin, and end without running any exit handler.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

PATIENCE_S = 120.0
"""Seconds that the compiling processes may take; what is not done by then is compiled in the caller's process."""

_rehearsing = False


def rehearsing() -> bool:
    """Whether kernel launches are noted instead of made (see `rehearse` and `without_launching`)."""
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
        parameters = {parameter.name: parameter for parameter in self.kernel.params}
        return id(self.kernel), *(
            (name, _specialized(value, parameters.get(name))) for name, value in sorted(self.arguments.items())
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


@contextlib.contextmanager
def without_launching() -> Iterator[None]:
    """Inside, operations on meta tensors choose their Triton kernels, whose launches do nothing: shapes and allocations
    are those of a GPU. Nothing is compiled."""
    with _noting({}):
        yield


def _compile_aside(jobs: list[_Launch], workers: int) -> None:
    """Compiles the jobs in forked processes. Their faults show when this process compiles what is missing."""
    from triton.runtime import driver

    # Triton's key of a kernel depends on which of the functions it calls had a key before. Made here, in one order, the
    # keys are the same in all processes.
    for job in jobs:
        _ = job.kernel.cache_key
    # Long kernels take longest, so they are begun first.
    jobs = sorted(jobs, key=lambda job: -len(job.kernel.src))
    taken = multiprocessing.get_context("fork").Value("i", 0)
    without_gpu = _DriverWithoutGpu(driver.active)
    processes: set[int] = set()
    try:
        for _ in range(workers):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside other threads
                try:
                    process = os.fork()  # not multiprocessing's: it closes stdin, and waits if a thread is reading it
                except OSError:  # a limit on processes or memory: those that there are do the work
                    break
            if process == 0:
                _compile_share(jobs, taken, without_gpu)
            processes.add(process)
        give_up = time.monotonic() + PATIENCE_S
        while processes and time.monotonic() < give_up:
            processes -= {process for process in processes if os.waitpid(process, os.WNOHANG)[0]}
            time.sleep(0.01)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # ended while an interruption came in
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _compile_share(jobs: list[_Launch], taken: Any, without_gpu: _DriverWithoutGpu) -> NoReturn:
    """Compiles one job after the other of those that no other process has taken, and ends the process."""
    from triton.runtime import driver

    try:
        driver.set_active(without_gpu)
        while True:
            with taken.get_lock():
                index, taken.value = taken.value, taken.value + 1
            if index >= len(jobs):
                break
            with contextlib.suppress(Exception):
                jobs[index].kernel.device_caches.clear()
                kernel = jobs[index].compile()
                # Up to Triton 3.6 a kernel's launcher is C code, which is compiled at the first launch.
                without_gpu.launcher(kernel.src, kernel.metadata)
    finally:
        os._exit(0)


class _DriverWithoutGpu:
    """What compiling needs of Triton's driver: a forked process must not ask CUDA."""

    def __init__(self, driver: Any) -> None:
        target, device = driver.get_current_target(), driver.get_current_device()
        self.get_current_target = lambda: target
        self.get_current_device = lambda: device
        self.get_current_stream = lambda device: 0
        self.launcher: Any = getattr(driver, "launcher_cls", None)
        self.utils = getattr(driver, "utils", None)


@contextlib.contextmanager
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


def _specialized(value: Any, parameter: Any) -> Any:
    """What Triton looks at in an argument: all of a constant or a launch option, little of other numbers."""
    if parameter is None or parameter.is_constexpr or not isinstance(value, int | float) or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return "float"
    wide = value.bit_length() > 31
    return ("int", wide) if parameter.do_not_specialize else ("int", wide, value == 1, value % 16 == 0)
