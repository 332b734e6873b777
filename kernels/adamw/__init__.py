"""AdamW's update of all parameters at once (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from affmae_kernels.adamw import reference
from affmae_kernels.dispatch import choose_backend

if TYPE_CHECKING:
    from affmae_kernels.adamw.triton import ChunkTable

__all__ = ["AdamW", "unsupported"]


class AdamW:
    """The update of a fixed list of parameters.

    With g the gradient divided by `grad_scale`, and t the number of the step:

        p = p (1 - lr wd),   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        parameters, moments, squares: p, m and v; floating, each list of the same shapes.
        step_P: fp32 [P], the number of steps that each parameter has taken.
        rates: lr of each parameter, 0-dimensional fp32 tensors (several parameters may share one); read at each update.
        decays: wd of each parameter.
        betas: b1 and b2.
        eps: see above.
        backend: see `affmae_kernels.dispatch`.

    Raises:
        ValueError: lists of different lengths or tensors of different shapes; a backend that cannot run.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        moments: Sequence[Tensor],
        squares: Sequence[Tensor],
        step_P: Tensor,
        rates: Sequence[Tensor],
        decays: Sequence[float],
        *,
        betas: tuple[float, float],
        eps: float,
        backend: str = "auto",
    ) -> None:
        lists = parameters, moments, squares, step_P, rates, decays
        if len({len(values) for values in lists}) != 1:
            raise ValueError(f"lists of different lengths: {[len(values) for values in lists]}")
        for p, m, v in zip(parameters, moments, squares, strict=True):
            if not p.shape == m.shape == v.shape:
                raise ValueError(f"moments {list(m.shape)} and {list(v.shape)} of a parameter {list(p.shape)}")
        self._state = parameters, moments, squares
        self._step_P, self._rates, self._decays, self._betas, self._eps = step_P, rates, decays, betas, eps
        obstacle = unsupported([*parameters, *moments, *squares])
        self._choice = choose_backend(backend, "adamw", step_P.device, obstacle)
        self._chunks: ChunkTable | None = None

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Tell where the gradients are. Needed before `update` is captured as a CUDA graph."""
        if self._choice.name == "triton":
            from affmae_kernels.adamw import triton

            addresses = [gradient.data_ptr() for gradient in gradients]
            if self._chunks is None or self._chunks.addresses != addresses:
                self._chunks = triton.ChunkTable(*self._state, gradients, self._rates, self._decays, addresses)

    def update(self, gradients: Sequence[Tensor], grad_scale: Tensor, found_inf: Tensor) -> None:
        """Update parameters, moments and steps in place.

        Args:
            gradients: of the parameters; contiguous fp32 for the kernel.
            grad_scale: 0-dimensional; every gradient is divided by it.
            found_inf: 0-dimensional; where it is 1, nothing is changed.
        """
        if self._choice.name == "triton":
            from affmae_kernels.adamw import triton

            self.prepare(gradients)
            assert self._chunks is not None
            triton.update(self._chunks, self._step_P, self._betas, self._eps, grad_scale, found_inf)
        else:
            reference.update(
                *self._state, gradients, self._step_P, self._rates, self._decays, self._betas, self._eps, grad_scale,
                found_inf,
            )  # fmt: skip


def unsupported(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot take these tensors; None: it can."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return f"{tensor.dtype} tensors of strides {tensor.stride()}, only dense fp32"
    return None
