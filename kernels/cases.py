"""The cases of every operation: what tests, `affmae doctor` and `affmae bench kernels` call, and how it is judged.

Each operation's folder has a `cases.py` with a list `CASES`; `OPERATIONS` below names the folders and is the only list
of operations. A case makes random inputs and calls the operation. It is judged against the reference in float64 on the
CPU, from the same inputs: results and every gradient.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPERATIONS = (
    "training_crops",
    "warped_crops",
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
    "tile_blending",
)
"""The folders of all operations, in reading order."""

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative Frobenius error of a result or gradient, by the dtype of the features; see `deviations`."""


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


class Deviation(NamedTuple):
    """How far a result or gradient is from the exact one."""

    error: float
    """Relative Frobenius error, or share of wrong entries of whole numbers; infinite if it is missing or not finite."""
    limit: float
    """Largest error that is allowed; 0 for whole numbers."""

    @property
    def ok(self) -> bool:
        """Whether it is close enough."""
        return self.error <= self.limit


def deviations(
    group: Sequence[Case], device: torch.device | str, dtype: torch.dtype, backend: str
) -> dict[str, Deviation]:
    """Compares cases of one operation with the reference in float64, result by result and gradient by gradient.

    fp32: every case counts by itself, and the worst is returned. In half precision a gradient that is a single number
    has no scale of its own, and one unit of a ReLU that flips is a large part of a small case: the squared errors of
    all cases are added first, and what the plain reference misses by in the same dtype on the same device, doubled, is
    allowed as well.

    Args:
        group: cases of one operation.
        device, dtype, backend: see `solve`.
    """
    exact = [solve(case, "cpu", dtype, "reference", exact=True) for case in group]
    found = [solve(case, device, dtype, backend) for case in group]
    names = list(dict.fromkeys(name for tensors in exact for name in tensors))
    whole = {name for tensors in exact for name, tensor in tensors.items() if not tensor.is_floating_point()}
    limits = {name: 0.0 if name in whole else LIMITS[dtype] for name in names}
    if dtype == torch.float32:
        errors = {
            name: max(_error([a], [b], name) for a, b in zip(found, exact, strict=True) if name in b) for name in names
        }
        return {name: Deviation(errors[name], limits[name]) for name in names}
    errors = {name: _error(found, exact, name) for name in names}
    beyond = [name for name in names if name not in whole and not errors[name] <= limits[name]]
    if beyond:
        plain = [solve(case, device, dtype, "reference") for case in group]
        for name in beyond:
            allowed = 2 * _error(plain, exact, name)
            if math.isfinite(allowed):
                limits[name] = max(limits[name], allowed)
    return {name: Deviation(errors[name], limits[name]) for name in names}


def _error(found: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]], name: str) -> float:
    """Error of the tensor of this name over all solutions that have it; see `Deviation.error`."""
    differences, wanted = [], []
    for candidate, solution in zip(found, exact, strict=True):
        if name not in solution:
            continue
        tensor, own = solution[name], candidate.get(name)
        if own is None or own.shape != tensor.shape:
            return math.inf
        differences.append((own.cpu().double() - tensor.double()).flatten())
        wanted.append(tensor.flatten())
    difference, values = torch.cat(differences), torch.cat(wanted)
    if not values.is_floating_point():
        return float((difference != 0).double().mean())
    relative = float(difference.norm()) / (float(values.norm()) or 1.0)
    return relative if math.isfinite(relative) else math.inf


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
