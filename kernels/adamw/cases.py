"""Cases of AdamW's update. It takes no gradients of its own; parameters and moments after updates are compared."""

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

    def prepare(*, backend: str, **tensors: list[Tensor]) -> dict[str, Any]:
        p, m, v, g = ([tensor.detach().clone() for tensor in each] for each in tensors.values())
        device = p[0].device
        step_P = torch.arange(len(p), device=device, dtype=torch.float32)
        rates = [torch.tensor(rate, device=device) for rate in (1e-2, 3e-3)]
        adamw = AdamW(
            p, m, v, step_P, [rates[i % 2] for i in range(len(p))], [0.1 * (i % 3) for i in range(len(p))],
            betas=(0.9, 0.95), eps=1e-8, backend=backend,
        )  # fmt: skip
        # One update to be timed; for comparisons three, of which the second changes nothing.
        found_inf = [torch.tensor(value, device=device) for value in ((0.0,) if network else (0.0, 1.0, 0.0))]
        scale = torch.tensor(1.5, device=device)
        state = {"p": p, "m": m, "v": v}
        return {"adamw": adamw, "state": state, "step": step_P, "gradients": g, "scale": scale, "found_inf": found_inf}

    def call(
        *, adamw: AdamW, state: dict[str, list[Tensor]], step: Tensor, gradients: list[Tensor], scale: Tensor,
        found_inf: list[Tensor], backend: str,
    ) -> dict[str, Tensor]:  # fmt: skip
        for flag in found_inf:
            adamw.update(gradients, scale, flag)
        results = {f"{kind} {i}": tensor for kind, tensors in state.items() for i, tensor in enumerate(tensors)}
        return results | {"steps": step.long()}

    return Case("adamw", name, make, call, prepare, network=network)


CASES = [
    _case("odd sizes", [(3, 5), (2049,), (1,), (4096,), (7, 300)]),
    _case("one parameter", [(17,)]),
    _case("base, two blocks", [(1536, 512), (512, 512), (1536, 512), (512, 1536), (512,)] * 2, network=True),
]
