"""The cases of every operation: what tests, `affmae doctor` and `affmae bench kernels` call, and how it is judged.

Each operation's folder has a `cases.py` with a list `CASES`; `OPERATIONS` below names the folders and is the only list
of operations. A case makes random inputs and calls the operation. It is judged against the reference in float64 on the
CPU, from the same inputs: results and every gradient.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPERATIONS = (
    "neighbourhoods",
    "stem",
    "cluster_attention",
    "encoder_blocks",
    "token_merging",
    "point_attention",
    "decoder_step",
    "residual_norm",
    "norm_linear",
    "pixel_loss",
    "segmentation_loss",
    "adamw",
)
"""The folders of all operations, in reading order."""

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative Frobenius error of a result or gradient, by the dtype of the features."""


@dataclass(frozen=True)
class Case:
    """One call of an operation on random inputs."""

    operation: str
    """One of `OPERATIONS`."""
    name: str
    """The shape in words; unique within the operation."""
    make: Callable[[torch.Generator, torch.dtype], dict[str, Any]]
    """make(random, dtype): arguments on the CPU by name. Features have the dtype, parameters are fp32. Values are
    tensors, or lists, dicts and named tuples of them; every floating tensor takes a gradient."""
    call: Callable[..., dict[str, Tensor]]
    """call(backend=..., **arguments): the results by name. Whole-number results take no gradient."""
    prepare: Callable[..., dict[str, Any]] = lambda backend, **arguments: arguments
    """prepare(backend=..., **arguments): arguments of `call`, where something has to be built on the device first that
    is not part of the operation (the neighbourhoods of cluster attention). Not timed."""
    network: bool = False
    """Whether the shape is one of the base network at 512 px (for timings and compile checks) instead of a small odd
    one (for comparisons)."""
    flops: int = 0
    """Floating-point operations of the forward pass that cannot be avoided; 0: bound by memory traffic."""
    seed: int = 0

    @property
    def title(self) -> str:
        """For messages and test ids."""
        return f"{self.operation}, {self.name}"

    def arguments(self, device: torch.device | str, dtype: torch.dtype, *, double: bool = False) -> dict[str, Any]:
        """Fresh arguments on a device, floating tensors as leaves that require gradients; `double`: in float64."""
        made = self.make(torch.Generator().manual_seed(self.seed), dtype)

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(device)
            return tensor.detach().to(device, torch.float64 if double else None, copy=True).requires_grad_()

        return {name: _map(value, leaf) for name, value in made.items()}


def scattered_positions(random: torch.Generator, batch: int, tokens: int, canvas_hw: tuple[int, int]) -> Tensor:
    """int32 (x, y) cells [B, N, 2], distinct within an image, in random order."""
    index_BN = torch.rand(batch, canvas_hw[0] * canvas_hw[1], generator=random).argsort(1)[:, :tokens]
    return torch.stack([index_BN % canvas_hw[1], index_BN // canvas_hw[1]], -1).int()


def cases(operation: str, *, network: bool | None = None) -> list[Case]:
    """The cases of one operation; `network`: only those of the network, or only the small ones."""
    found: list[Case] = importlib.import_module(f"affmae_kernels.{operation}.cases").CASES
    return [case for case in found if network is None or case.network == network]


def solve(
    case: Case, device: torch.device | str, dtype: torch.dtype, backend: str, *, exact: bool = False
) -> dict[str, Tensor]:
    """Results and gradients of a case by name, on the device.

    The gradient that reaches each floating result is random and the same on every device.

    Args:
        case: what to call.
        device: where.
        dtype: of the features.
        backend: see `affmae_kernels.dispatch`.
        exact: compute in float64 from the inputs as rounded to `dtype`.
    """
    arguments = case.arguments(device, dtype, double=exact)
    leaves = _named_leaves(arguments)
    results = case.call(backend=backend, **case.prepare(backend=backend, **arguments))
    floating = {name: tensor for name, tensor in results.items() if tensor.requires_grad}
    if not floating:
        return {name: tensor.detach() for name, tensor in results.items()}
    random = torch.Generator().manual_seed(case.seed + 1)
    upstream = [
        torch.randn(t.shape, generator=random).to(dtype if t.ndim else torch.float32).to(t.device, t.dtype)
        for t in floating.values()
    ]
    gradients = torch.autograd.grad(list(floating.values()), list(leaves.values()), upstream, allow_unused=True)
    named = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {name: tensor.detach() for name, tensor in results.items()} | named


def errors(case: Case, device: torch.device | str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Relative Frobenius error of every result and gradient against the reference in float64; share of wrong entries
    for whole numbers; infinite where something is missing or not finite."""
    exact = solve(case, "cpu", dtype, "reference", exact=True)
    found = solve(case, device, dtype, backend)
    return {name: _error(found.get(name), tensor) for name, tensor in exact.items()}


def _error(found: Tensor | None, exact: Tensor) -> float:
    if found is None or found.shape != exact.shape:
        return math.inf
    if not exact.is_floating_point():
        return float((found.cpu() != exact).double().mean())
    difference = float((found.cpu().double() - exact).norm())
    size = float(exact.norm())
    return (difference / size if size else difference) if math.isfinite(difference) else math.inf


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed; lists, tuples, named tuples and dicts are walked through."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(item, change) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change) for item in value)
    return value


def _named_leaves(value: Any, name: str = "") -> dict[str, Tensor]:
    """The floating tensors in a value, named by their path."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= _named_leaves(item, f"{name}.{key}" if name else str(key))
    return found
