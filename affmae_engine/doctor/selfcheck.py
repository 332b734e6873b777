"""Whether the operations compute right here: small random problems against float64 on the CPU, with every gradient.

What is unusual: errors of one tensor are gathered over all problems before they are judged, because the gradient of a
single number, or of a tensor that hardly matters in one tiny problem, has no scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from affmae_engine.doctor import problems
from affmae_engine.doctor.problems import Make, Problem, Shape, Tensors
from affmae_engine.errors import first_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"exact": 0.0, "fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Largest relative Frobenius error; for operations on whole numbers the largest share of wrong entries."""
EXACT: dict[str, Make] = {
    "neighbourhoods": problems.neighbourhoods_problem,
    "point_attention": problems.nearest_table_problem,
}
FLOATING: dict[str, Make] = {
    "cluster_attention": problems.cluster_attention_problem,
    "token_merging": problems.token_merging_problem,
    "point_attention": problems.point_attention_problem,
    "residual_norm": problems.residual_norm_problem,
    "bias_gelu": problems.bias_gelu_problem,
    "linear_relu": problems.linear_relu_problem,
}
SHAPES = (
    Shape(2, 197, (17, 23), 3, 32, 79),
    Shape(1, 61, (9, 11), 2, 64, 24),
    Shape(2, 3, (3, 4), 1, 32, 2),
    Shape(1, 700, (33, 31), 2, 32, 280),
)
SEEDS = (0, 1)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Check:
    """One operation in one precision ("exact": on whole numbers)."""

    operation: str
    precision: str
    limit: float
    error: float | None
    """The largest error of any tensor; None when the operation could not be run."""
    tensor: str
    """What has that error: the result, or the gradient of which input."""
    problems: int
    """Random problems that were solved."""
    failure: str = ""
    """Why it could not be run."""

    @property
    def ok(self) -> bool:
        """Whether it ran and the error is within the limit."""
        return self.error is not None and self.error <= self.limit


@dataclass
class Gathered:
    """Squared differences and squared exact values of one tensor, over all problems."""

    difference: float = 0.0
    exact: float = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Adds one problem's tensors, of the same shape."""
        if found.shape != exact.shape:
            raise ValueError(f"the shape is {list(found.shape)}, not {list(exact.shape)}")
        self.difference += float((found.cpu().double() - exact).square().sum())
        self.exact += float(exact.square().sum())

    def error(self) -> float:
        """Relative Frobenius error; infinite when anything is not finite."""
        if not math.isfinite(self.difference):
            return math.inf
        if self.exact == 0:
            return math.sqrt(self.difference)
        return math.sqrt(self.difference / self.exact)


@dataclass
class Counted:
    """Entries of one whole-number tensor that differ, over all problems."""

    wrong: int = 0
    entries: int = 0
    shapes_differ: bool = False

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Adds one problem's tensors."""
        if found.shape != exact.shape:
            self.shapes_differ = True
            return
        self.wrong += int((found.cpu() != exact).sum())
        self.entries += exact.numel()

    def error(self) -> float:
        """Share of wrong entries."""
        return math.inf if self.shapes_differ else self.wrong / max(1, self.entries)


def run_checks(
    device: torch.device, precisions: tuple[str, ...], backend: str, on_step: Callable[[str], None] = lambda step: None
) -> Iterator[Check]:
    """Checks every operation, one by one.

    Args:
        device: where the operations run.
        precisions: of `DTYPES`.
        backend: `kernels.backend`.
        on_step: told what comes next.
    """
    for operation in ("neighbourhoods", *FLOATING):
        if operation in EXACT:
            on_step(f"checking {operation}, whole numbers")
            yield check(operation, "exact", device, backend)
        for precision in precisions if operation in FLOATING else ():
            on_step(f"checking {operation} in {precision}")
            yield check(operation, precision, device, backend)


def check(operation: str, precision: str, device: torch.device, backend: str) -> Check:
    """Solves every problem on the device and exactly; never raises."""
    gathered: dict[str, Gathered | Counted] = {}
    solved, limit = 0, LIMITS[precision]
    make = (EXACT if precision == "exact" else FLOATING)[operation]
    try:
        for shape in SHAPES:
            for seed in SEEDS:
                problem = make(shape, DTYPES.get(precision, torch.float32), seed)
                exact = solve(problem, CPU, "reference", exactly=True)
                for name, found in solve(problem, device, backend).items():
                    total = gathered.setdefault(name, Counted() if precision == "exact" else Gathered())
                    total.add(found, exact[name])
                solved += 1
    except Exception as error:  # whatever a kernel raises is the answer to the question whether it works
        return Check(operation, precision, limit, None, "", solved, first_line(error))
    errors = {name: total.error() for name, total in gathered.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Check(operation, precision, limit, errors[worst], worst, solved)


def solve(problem: Problem, device: torch.device, backend: str, *, exactly: bool = False) -> Tensors:
    """The operation's results and the gradients of all its floating inputs, by name.

    Args:
        problem: its inputs lie on the CPU.
        device: where to compute.
        backend: `kernels.backend`.
        exactly: compute in float64, from `fixed_exact`.
    """
    dtype = torch.float64 if exactly else None
    leaves = {
        name: tensor.detach().to(device, dtype, copy=True).requires_grad_() for name, tensor in problem.leaves.items()
    }
    given = problem.fixed_exact if exactly else problem.fixed
    fixed = {name: tensor.to(device) for name, tensor in given.items()}
    results = problem.view(problem.bind(leaves, fixed, backend)(), fixed)
    if not leaves:
        return results
    feature_dtype = next(iter(problem.leaves.values())).dtype
    generator = torch.Generator().manual_seed(problem.seed + 1)
    upstream = [torch.randn(r.shape, generator=generator).to(feature_dtype).to(r) for r in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()} | named
