"""Cases of AdamW's update. It takes no gradients of its own; parameters and moments after two updates are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.adamw import AdamW
from affmae_kernels.cases import Case


def _case(name: str, shapes: list[tuple[int, ...]], *, network: bool = False) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        def normal() -> list[Tensor]:
            return [torch.randn(shape, generator=random) for shape in shapes]

        squares = [tensor.square() for tensor in normal()]
        return {"parameters": normal(), "moments": normal(), "squares": squares, "gradients": normal()}

    def call(*, backend: str, **tensors: list[Tensor]) -> dict[str, Tensor]:
        p, m, v, g = ([tensor.detach().clone() for tensor in each] for each in tensors.values())
        device = p[0].device
        step_P = torch.arange(len(p), device=device, dtype=torch.float32)
        rates = [torch.tensor(rate, device=device) for rate in (1e-2, 3e-3)]
        adamw = AdamW(
            p, m, v, step_P, [rates[i % 2] for i in range(len(p))], [0.1 * (i % 3) for i in range(len(p))],
            betas=(0.9, 0.95), eps=1e-8, backend=backend,
        )  # fmt: skip
        scale = torch.tensor(1.5, device=device)
        for found_inf in (0.0, 1.0, 0.0):
            adamw.update(g, scale, torch.tensor(found_inf, device=device))
        return {f"{kind} {i}": t for kind, ts in (("p", p), ("m", m), ("v", v)) for i, t in enumerate(ts)} | {
            "steps": step_P.long()
        }

    return Case("adamw", name, make, call, network=network)


CASES = [
    _case("odd sizes", [(3, 5), (2049,), (1,), (4096,), (7, 300)]),
    _case("one parameter", [(17,)]),
    _case("base, two blocks", [(1536, 512), (512, 512), (1536, 512), (512, 1536), (512,)] * 2, network=True),
]
