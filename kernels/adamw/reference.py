"""AdamW's update in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update(
    parameters: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    gradients: Sequence[Tensor],
    step_P: Tensor,
    rates: Sequence[Tensor],
    decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor,
    found_inf: Tensor,
) -> None:
    """See the package for the formula."""
    kept = found_inf != 0
    step_P += 1 - found_inf.to(step_P.dtype)
    correction1_P, correction2_P = (1 - beta ** step_P.double() for beta in betas)
    for i, (p, m, v, g) in enumerate(zip(parameters, moments, squares, gradients, strict=True)):
        g = g / grad_scale.to(g.dtype)
        new_m = betas[0] * m + (1 - betas[0]) * g
        new_v = betas[1] * v + (1 - betas[1]) * g * g
        size = (rates[i].double() / correction1_P[i]).to(p.dtype)
        new_p = p * (1 - rates[i].to(p.dtype) * decays[i])
        new_p -= size * new_m / (new_v.sqrt() / correction2_P[i].sqrt().to(p.dtype) + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(kept, old, new))
