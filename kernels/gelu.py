"""Exact GELU inside Triton kernels: GELU(u) = u Phi(u), GELU'(u) = Phi(u) + u phi(u)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal(u):
    """(Phi(u), phi(u)): the standard normal distribution and its density.

    Phi is Abramowitz and Stegun 7.1.26 (error below 1.5e-7, that of fp32): its exponential is the one of phi, and the
    library's erf takes twice the instructions.
    """
    density = tl.exp2(u * u * -0.7213475204444817)
    t = 1 / (1 + 0.23164189 * tl.abs(u))  # 0.3275911 / sqrt(2)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = tail * density
    return tl.where(u > 0, 1 - tail, tail), density * 0.3989422804014327
