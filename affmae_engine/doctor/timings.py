"""How long the operations take at a shape of production, the kernel and plain PyTorch side by side.

On a card: the first stage of the base network on 4 images of 512 x 512, half of it hidden; on a CPU one image of
256 x 256 in fp32. Medians of single calls, host included: indicative, `docs/benchmarks.md` measures with care.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from affmae_engine.doctor import problems
from affmae_engine.doctor.problems import Make, Problem, Shape
from affmae_engine.doctor.selfcheck import DTYPES
from affmae_engine.errors import first_line

TIMED: dict[str, tuple[str, Make]] = {
    "neighbourhoods": ("neighbourhoods", problems.neighbourhoods_problem),
    "cluster_attention": ("cluster_attention", problems.cluster_attention_problem),
    "token_merging": ("token_merging", problems.token_merging_problem),
    "nearest_table": ("point_attention", problems.nearest_table_problem),
    "point_attention": ("point_attention", problems.point_attention_problem),
    "residual_norm": ("residual_norm", problems.residual_norm_problem),
    "bias_gelu": ("bias_gelu", problems.bias_gelu_problem),
    "linear_relu": ("linear_relu", problems.linear_relu_problem),
}
"""What is timed: the operation it belongs to, and how a problem is made."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call; no backward pass of operations on whole numbers."""

    forward_ms: float
    backward_ms: float | None


@dataclass(frozen=True)
class Timing:
    """One row: the kernel's times (None where no kernel runs) and those of plain PyTorch."""

    name: str
    operation: str
    shape: str
    precision: str
    kernel: Times | None
    reference: Times | None
    failure: str = ""


def run_timings(
    device: torch.device,
    precision: str,
    backends: dict[str, str],
    backend: str,
    on_step: Callable[[str], None] = lambda step: None,
) -> Iterator[Timing]:
    """Times every operation, one by one; never raises.

    Args:
        device: where.
        precision: of the features.
        backends: the implementation taken for each operation.
        backend: `kernels.backend`.
        on_step: told what comes next.
    """
    for name, (operation, make) in TIMED.items():
        on_step(f"timing {name}")
        shape = production_shape(name, device)
        kernel: Times | None = None
        reference: Times | None = None
        failure = ""
        try:
            problem = make(shape, DTYPES[precision], 0)
            if backends.get(operation) == "triton":
                kernel = measure(problem, device, backend)
            reference = measure(problem, device, "reference")
        except Exception as error:  # out of memory, a kernel that fails: shown in its row
            failure = first_line(error)
        yield Timing(name, operation, _described(name, shape), precision, kernel, reference, failure)


def production_shape(name: str, device: torch.device) -> Shape:
    """The first stage of the base network, half of the image hidden; for point attention the decoder's last step."""
    batch, side = (4, 64) if device.type == "cuda" else (1, 32)
    tokens = side * side // 2
    if name in ("point_attention", "residual_norm", "linear_relu"):
        return Shape(batch, tokens, (side, side), 6, 64, tokens)
    return Shape(batch, tokens, (side, side), 4, 32, int(0.4 * tokens))


def measure(problem: Problem, device: torch.device, backend: str) -> Times:
    """Medians of one implementation's forward and backward pass."""
    leaves = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in problem.leaves.items()}
    fixed = {name: tensor.to(device) for name, tensor in problem.fixed.items()}
    call = problem.bind(leaves, fixed, backend)
    warm, repeats = (3, 20) if device.type == "cuda" else (1, 5)
    if not leaves:
        for _ in range(warm):
            call()
        return Times(statistics.median(_clocked(call, device)[0] for _ in range(repeats)), None)
    wanted = list(leaves.values())
    upstream = torch.randn_like(call())
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(warm + repeats):
        ms, out = _clocked(call, device)
        forward.append(ms)
        backward.append(_clocked(partial(torch.autograd.grad, out, wanted, upstream), device)[0])
    return Times(statistics.median(forward[warm:]), statistics.median(backward[warm:]))


def _clocked(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one call and what it returned; CUDA events on a card."""
    if device.type != "cuda":
        start = time.perf_counter()
        out = call()
        return 1e3 * (time.perf_counter() - start), out
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    out = call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last), out


def _described(name: str, shape: Shape) -> str:
    text = f"{shape.batch} x {shape.tokens} tokens"
    if name in ("cluster_attention", "point_attention"):
        return f"{text}, {shape.heads} heads of {shape.width}"
    if name == "token_merging":
        return f"{text} to {shape.asking}, {shape.heads * shape.width} channels"
    if name in ("residual_norm", "bias_gelu", "linear_relu"):
        return f"{text}, {shape.heads * shape.width} channels"
    return text
