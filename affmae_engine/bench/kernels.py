"""Times single operations: the chosen implementation and the reference, beside what the device could do.

Unusual: the gate. An operation is compared with the float64 reference at the very shape it is timed at, and where it is
wrong no time is taken. To keep the reference small only the first and the last image are compared; the gradient that
flows back is zero in all others, so that the gradients of shared parameters come from these two alone.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from affmae_engine.bench.ceilings import Ceilings
from affmae_engine.bench.kernel_cases import Case, Inputs, Setting, all_cases
from affmae_engine.bench.timing import Call, Timing, measure
from affmae_engine.errors import first_line
from affmae_kernels.dispatch import choose_backend

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Largest relative Frobenius error of the result and of each gradient, by the dtype of the features."""
ZERO = 1e-10
"""A float64 gradient smaller than this times the one it comes from is rounding."""
INPUT_SETS = 4
_GATE_SEED, _TIMING_SEED = 1, 2


@dataclass
class KernelResult:
    """One case. status: "ok", "wrong" (the gate is red), "out of memory" or "failed". Times in milliseconds."""

    op: str
    size: str
    resolution: int
    shape: str
    backend: str
    status: str = "ok"
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative Frobenius errors against float64; shares of differing entries for whole numbers."""
    forward: dict[str, float] | None = None
    """Forward pass: "ms" (median), "low_ms", "high_ms", "repeats", "graphed", "bound_ms", "gb_s", "tflop_s"."""
    both: dict[str, float] | None = None
    """Forward and backward pass, likewise; None where there are no gradients."""
    reference_forward_ms: float | None = None
    reference_both_ms: float | None = None

    @property
    def worst_error(self) -> float:
        """The largest of `errors`, NaN counting as infinite."""
        return max((math.inf if math.isnan(error) else error for error in self.errors.values()), default=0.0)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "worst_error": self.worst_error}


def run_cases(
    settings: list[Setting],
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings | None,
    *,
    operations: tuple[str, ...],
    backend: str = "auto",
    seconds: float = 0.2,
    reference: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[KernelResult]:
    """Gate and times of every case, one after the other.

    Args:
        settings: sizes, resolutions and batches.
        device, dtype: where, and the dtype of the features.
        ceilings: what the device can do; None: the gate alone, no times.
        operations: which of `kernel_cases.OPERATIONS`.
        backend: see `affmae_kernels.dispatch`.
        seconds: roughly how long to measure each time.
        reference: time the reference too.
        tell: told which case is next.
    """
    for case in all_cases(settings, operations):
        tell(f"{case.op} {case.shape}")
        chosen = choose_backend(backend, case.op, device).name
        result = KernelResult(case.op, case.setting.size, case.setting.resolution, case.shape, chosen)
        try:
            _gate(result, case, device, dtype)
            if ceilings is not None and result.status == "ok":
                _time(result, case, device, dtype, ceilings, seconds, reference)
        except torch.OutOfMemoryError as error:
            result.status, result.note = "out of memory", first_line(error)
        except Exception as error:  # a kernel that does not compile must not end the others' measurement
            result.status, result.note = "failed", first_line(error)
        if device.type == "cuda":
            gc.collect()  # what cycles hold would stay on the card; on a large heap this takes a second
            torch.cuda.empty_cache()
        yield result


def gate_errors(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Relative Frobenius errors of the result and of each gradient against the float64 reference, by name.

    Results of whole numbers: the share of entries that differ.
    """
    inputs = case.make(_GATE_SEED, device, dtype)
    images = sorted({0, case.setting.batch - 1})
    exact = inputs.exact(images)
    out = case.run(inputs, backend)
    expected = case.run(exact, "reference")
    if not out.is_floating_point():
        return {"result": (out[images] != expected).double().mean().item()}
    grad_out = torch.zeros_like(out)
    grad_out[images] = torch.randn(
        expected.shape, generator=torch.Generator(device).manual_seed(_GATE_SEED), device=device
    ).to(out.dtype)
    names = list(inputs.differentiable())
    grads = torch.autograd.grad(out, list(inputs.differentiable().values()), grad_out)
    wanted = torch.autograd.grad(expected, list(exact.differentiable().values()), grad_out[images].double())
    errors = {"result": _relative(out[images], expected)}
    for name, grad, true in zip(names, grads, wanted, strict=True):
        errors[f"d {name}"] = _relative(grad[images] if name in inputs.features else grad, true, grad_out)
    return errors


def _gate(result: KernelResult, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    result.errors = gate_errors(case, device, dtype, result.backend)
    limit = TOLERANCE[dtype] if case.backward else 0.0
    wrong = {name: error for name, error in result.errors.items() if not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        result.status, result.note = "wrong", f"{listed}; allowed {limit:g}"


def _time(
    result: KernelResult,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    seconds: float,
    reference: bool,
) -> None:
    fast = device.type == "cuda" and result.backend == "triton"
    sets = [case.make(_TIMING_SEED + i, device, dtype) for i in range(INPUT_SETS if fast else 1)]
    work = case.forward(dtype.itemsize)
    gigabytes, gigaflops = work.read_write / 1e9, work.flops / 1e9
    calls: list[Call] = [partial(case.run, inputs, result.backend) for inputs in sets]
    timing = measure(calls, device, seconds=seconds, graph=fast)
    result.forward = _record(timing, gigabytes, gigaflops, ceilings)
    if case.backward is not None:
        more = case.backward(dtype.itemsize)
        calls = [_both(case, inputs, result.backend) for inputs in sets]
        timing = measure(calls, device, seconds=seconds, graph=fast)
        total = gigabytes + more.read_write / 1e9, gigaflops + more.flops / 1e9
        result.both = _record(timing, *total, ceilings)
    if reference and result.backend != "reference":
        del calls, sets[1:]
        result.reference_forward_ms = measure(
            [partial(case.run, sets[0], "reference")], device, seconds=seconds, warmup=1
        ).ms
        if case.backward is not None:
            result.reference_both_ms = measure(
                [_both(case, sets[0], "reference")], device, seconds=seconds, warmup=1
            ).ms


def _both(case: Case, inputs: Inputs, backend: str) -> Call:
    """A call of the forward and the backward pass."""
    wanted = list(inputs.differentiable().values())
    grad_out = torch.randn_like(case.run(inputs, backend).detach())
    return lambda: torch.autograd.grad(case.run(inputs, backend), wanted, grad_out)


def _record(timing: Timing, gigabytes: float, gigaflops: float, ceilings: Ceilings) -> dict[str, float]:
    return {
        **asdict(timing),
        "bound_ms": ceilings.bound_ms(gigabytes, gigaflops),
        "gb_s": gigabytes / timing.ms * 1e3,
        "tflop_s": gigaflops / timing.ms,
    }


def _relative(got: Tensor, expected: Tensor, flowing: Tensor | None = None) -> float:
    """|got - expected| / |expected|. A gradient that is nothing but float64 rounding is measured against `flowing`,
    the gradient it comes from (with a single token to ask, logits have none)."""
    scale = torch.linalg.vector_norm(expected)
    if flowing is not None:
        size = torch.linalg.vector_norm(flowing.double())
        scale = torch.where(scale > ZERO * size, scale, size)
    return (torch.linalg.vector_norm(got.double() - expected) / scale.clamp(min=1e-300)).item()
