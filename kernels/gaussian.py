"""The standard normal distribution for kernels that compute GELU.

Phi comes from Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7). Its exponential is the one of the density, so
both cost half of what the library's erf alone does.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_LOG2_E = tl.constexpr(0.7213475204444817)
RSQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def normal(u):
    """(Phi(u), phi(u)): the cumulative distribution and the density, fp32."""
    density = tl.exp2(u * u * -HALF_LOG2_E)
    root = tl.rsqrt(1 + 0.23164189 * tl.abs(u))  # 0.3275911 / sqrt(2); rsqrt is cheaper than a division
    t = root * root
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = tail * density
    return tl.where(u > 0, 1 - tail, tail), density * RSQRT_2_PI
