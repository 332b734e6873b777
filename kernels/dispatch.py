"""Which implementation of an operation runs, and why: one plain function, so that the reason can be shown.

`auto` takes the Triton kernels wherever they can run and the reference elsewhere; `triton` and `reference` force.
On a CPU the reference is simply right; on a card that cannot run the kernels it is a loss, so one warning says why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from affmae_kernels import launch, precompile

Backend = Literal["auto", "triton", "reference"]
_BACKENDS = get_args(Backend)

_logger = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """The implementation taken for one operation and the reason in words."""

    name: Literal["triton", "reference"]
    reason: str


def choose_backend(backend: str, op: str, device: torch.device, unsupported: str | None = None) -> Choice:
    """Resolves `backend` for operation `op`.

    Args:
        backend: one of `Backend`.
        op: name of the operation, for messages.
        device: where its tensors are.
        unsupported: why the kernel cannot take these very arguments (a dtype, a head width); None: it can.

    Raises:
        ValueError: when `backend` is not one of `Backend`, or when it is `triton` and the kernel cannot run.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend of {op} must be one of {', '.join(_BACKENDS)}; got {backend!r}")
    if backend == "reference":
        return Choice("reference", "asked for")
    if backend == "auto" and device.type == "cpu":
        return Choice("reference", "the tensors are on the CPU")
    if backend == "auto" and device.type == "meta" and not precompile.rehearsing():
        return Choice("reference", "the tensors have no data")
    obstacle = None if precompile.rehearsing() else launch.obstacle(device.type, device.index or 0)
    if obstacle is None and unsupported is None:
        return Choice("triton", "asked for" if backend == "triton" else "fastest on this card")
    reason = obstacle or f"the kernel does not take {unsupported}"
    if backend == "triton":
        raise ValueError(f"{op} cannot run as a Triton kernel: {reason}; set kernels.backend to auto or reference")
    _warn_once(obstacle or f"{op}: {reason}")
    return Choice("reference", reason)


def fp32_only(parameter: torch.Tensor) -> str | None:
    """Why fused operations cannot take parameters of this dtype; None: they can."""
    return None if parameter.dtype == torch.float32 else f"parameters of {parameter.dtype}, only fp32"


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        _logger.warning("plain PyTorch instead of Triton kernels, several times slower: %s", reason)
