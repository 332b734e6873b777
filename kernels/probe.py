"""The smallest kernel: shows whether this machine can compile and run Triton at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(OUT, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(OUT + index, index)


def run(index: int) -> None:
    """Compiles and runs it on a card.

    Raises:
        RuntimeError: when the result is wrong; whatever Triton raises when it cannot compile.
    """
    with torch.cuda.device(index):
        out = torch.full((16,), -1, dtype=torch.int32, device="cuda")
        _count_kernel[(1,)](out, SIZE=16)
        if out.tolist() != list(range(16)):
            raise RuntimeError("a test kernel gave a wrong result")
