"""What this device can do at most, measured: bytes per second of a copy, operations per second of a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from affmae_engine.bench.timing import measure


@dataclass(frozen=True)
class Ceilings:
    """gb_s: bytes read plus written by a device copy, 1e9 per second. tflop_s: matrix product, 1e12 per second."""

    gb_s: float
    tflop_s: float

    def bound_ms(self, gigabytes: float, gigaflops: float) -> float:
        """The time below which a computation cannot come, whichever of the two limits it."""
        return max(gigabytes / self.gb_s * 1e3, gigaflops / self.tflop_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copies a buffer far larger than any cache, and multiplies large square matrices of `dtype`."""
    on_card = device.type == "cuda"
    source = torch.ones(2**29 if on_card else 2**24, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device)
    edge = 8192 if on_card else 256
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = measure([lambda: left @ right], device, seconds=0.5 if on_card else 0.05)
    return Ceilings(2 * source.numel() / copy.ms / 1e6, 2 * edge**3 / product.ms / 1e9)
