"""Squared error of predicted pixels: one pass that also writes the difference, which is the gradient but for a factor.

Axes: E elements, BLOCK elements of a turn, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.launch import multiprocessors

BLOCK = 1024
PROGRAMS_PER_SM = 4


@triton.jit(do_not_specialize=["E"])
def _pixel_loss_kernel(PRED, TARGET, REAL, DIFFERENCE, PART, E, BLOCK: tl.constexpr):
    """One program: every P-th block; the differences, and their squares' sum and count in its row of PART [P, 2]."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(E, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < E
        pred = tl.load(PRED + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        target = tl.load(TARGET + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        real = inside
        if REAL is not None:
            real = tl.load(REAL + at, mask=inside, other=0) != 0  # [BLOCK]
        difference = tl.where(real, pred - target, 0.0)
        tl.store(DIFFERENCE + at, difference.to(DIFFERENCE.dtype.element_ty), mask=inside)
        total += difference * difference
        count += real.to(tl.float32)
    tl.store(PART + tl.program_id(0) * 2, tl.sum(total, 0))
    tl.store(PART + tl.program_id(0) * 2 + 1, tl.sum(count, 0))


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
        elements = pred.numel()
        programs = min(triton.cdiv(elements, BLOCK), PROGRAMS_PER_SM * multiprocessors(pred.device))
        difference = torch.empty_like(pred)
        part_P2 = torch.empty(programs, 2, dtype=torch.float32, device=pred.device)
        _pixel_loss_kernel[(programs,)](
            PRED=pred, TARGET=target, REAL=real, DIFFERENCE=difference, PART=part_P2, E=elements, BLOCK=BLOCK
        )
        total, count = column_sums(part_P2).unbind()
        ctx.save_for_backward(difference, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        difference, count = ctx.saved_tensors
        return difference * (2 * dloss / count), None, None


def pixel_loss(pred_BQP: Tensor, target_BQP: Tensor, real_BQP: Tensor | None) -> Tensor:
    """See the package for the formula and the shapes."""
    real_BQP = None if real_BQP is None else real_BQP.contiguous()
    loss: Tensor = _PixelLoss.apply(pred_BQP.contiguous(), target_BQP.contiguous(), real_BQP)
    return loss
