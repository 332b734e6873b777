"""Whether the operations compute correctly here: their small cases against float64 on the CPU, with every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from affmae_engine.bench.kernels import wrong_by
from affmae_engine.errors import first_line
from affmae_kernels.cases import cases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Check:
    """One operation in one precision."""

    operation: str
    precision: str
    limit: float
    """Largest relative Frobenius error of the tensor; 0 for whole numbers, which must be equal."""
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
    worst = ("", 0.0, math.inf)
    compared = 0
    try:
        for case in cases(operation, network=False):
            for name, (error, limit) in wrong_by(case, device, DTYPES[precision], backend).items():
                worst = max(worst, (name, error, limit), key=_share_of_limit)
            compared += 1
        if not compared:
            raise ValueError(f"{operation} has no small cases")
    except Exception as error:  # whatever a kernel raises answers the question whether it works
        return Check(operation, precision, 0.0, None, "", compared, first_line(error))
    name, found, limit = worst
    return Check(operation, precision, limit, found, name, compared)


def _share_of_limit(tensor: tuple[str, float, float]) -> float:
    _, error, limit = tensor
    if limit == 0 or math.isnan(error):
        return math.inf if error else 0.0
    return error / limit
