"""How long the operations take at the shapes of the base network, the kernel and plain PyTorch side by side.

Host time is included, and caches are cold. It tells a GPU that works from one that does not; `affmae bench kernels`
measures with more care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from affmae_engine.bench.kernels import CallTimes, time_case
from affmae_engine.doctor.selfcheck import DTYPES
from affmae_engine.errors import first_line
from affmae_kernels.cases import Case, cases

SECONDS = 0.05
"""About how long each measurement takes."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of the forward pass, and of forward and backward together (None without gradients)."""

    forward_ms: float
    both_ms: float | None

    @classmethod
    def of(cls, times: CallTimes) -> Times:
        return cls(times.forward.ms, times.both.ms if times.both else None)


@dataclass(frozen=True)
class OperationTiming:
    """One case of an operation."""

    operation: str
    shape: str
    precision: str
    kernel: Times | None
    """None where no Triton kernel is used."""
    reference: Times | None
    failure: str = ""


def run_timings(
    device: torch.device,
    precision: str,
    backends: Mapping[str, str],
    on_step: Callable[[str], None] = lambda step: None,
) -> Iterator[OperationTiming]:
    """Time the network cases of operations one by one; never raises.

    Args:
        device: where.
        precision: of the features.
        backends: the implementation of each operation to time.
        on_step: called with what comes next.
    """
    for operation, backend in backends.items():
        on_step(f"timing {operation}")
        try:
            found = cases(operation, network=True)
        except Exception as error:
            yield OperationTiming(operation, "", precision, None, None, first_line(error))
            continue
        for case in found:
            yield _timing(case, device, precision, backend)


def _timing(case: Case, device: torch.device, precision: str, backend: str) -> OperationTiming:
    dtype = DTYPES[precision]
    kernel = reference = None
    failure = ""
    try:
        if backend == "triton":
            kernel = Times.of(time_case(case, device, dtype, "triton", seconds=SECONDS))
        reference = Times.of(time_case(case, device, dtype, "reference", seconds=SECONDS))
    except Exception as error:  # out of memory, a kernel that fails: shown in its row
        failure = first_line(error)
    return OperationTiming(case.operation, case.name, precision, kernel, reference, failure)
