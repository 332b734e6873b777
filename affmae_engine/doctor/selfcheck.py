"""Whether the operations compute correctly here: their small cases against float64 on the CPU, with every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from affmae_engine.errors import first_line
from affmae_kernels.cases import Deviation, cases, deviations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Check:
    """One operation in one precision."""

    operation: str
    precision: str
    limit: float
    """Largest error of the tensor, see `affmae_kernels.cases.deviations`."""
    error: float | None
    """Of the tensor that is closest to its limit, or beyond; None when the operation could not be run."""
    tensor: str
    """Which result or gradient that is."""
    cases: int
    """Cases that were compared."""
    failure: str = ""
    """Why it could not be run."""

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.limit


def run_checks(
    device: torch.device,
    operations: Sequence[str],
    precisions: Sequence[str],
    backend: str,
    on_step: Callable[[str], None] = lambda step: None,
) -> Iterator[Check]:
    """Check operations one by one.

    Args:
        device: where they run.
        operations: which of `affmae_kernels.cases.OPERATIONS`.
        precisions: of `DTYPES`.
        backend: `kernels.backend`.
        on_step: called with what comes next.
    """
    for operation in operations:
        for precision in precisions:
            on_step(f"checking {operation} in {precision}")
            yield check(operation, precision, device, backend)


def check(operation: str, precision: str, device: torch.device, backend: str) -> Check:
    """Compare all small cases of an operation; never raises."""
    try:
        small = cases(operation, network=False)
        if not small:
            raise ValueError(f"{operation} has no small cases")
        found = deviations(small, device, DTYPES[precision], backend)
        name, worst = max(found.items(), key=lambda item: _share_of_limit(item[1]))
    except Exception as error:  # whatever a kernel raises answers the question whether it works
        return Check(operation, precision, 0.0, None, "", 0, first_line(error))
    return Check(operation, precision, worst.limit, worst.error, name, len(small))


def _share_of_limit(tensor: Deviation) -> float:
    if tensor.limit == 0:
        return math.inf if tensor.error else 0.0
    return tensor.error / tensor.limit
