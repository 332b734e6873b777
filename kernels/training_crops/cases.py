"""Cases of training crops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.training_crops import training_crops


def _case(name: str, edges: list[int], size: int, *, clahe: bool = False, network: bool = False, seed: int = 0) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        batch, edge = len(edges), max(edges)
        gray = torch.randint(0, 256, (batch, edge, edge), generator=random, dtype=torch.uint8)
        turn = torch.arange(batch, dtype=torch.int32) % 8
        window = torch.stack([torch.tensor(edges, dtype=torch.int32), turn], 1)
        return {"crop_BYX": gray, "window_B2": window}

    def prepare(*, backend: str, crop_BYX: Tensor, window_B2: Tensor) -> dict[str, Any]:
        intensity = torch.tensor([127.5, 60.0, -1.9, 1.8], device=crop_BYX.device).repeat(len(crop_BYX), 1)
        return {"crop_BYX": crop_BYX, "window_B2": window_B2, "intensity_B4": intensity}

    def call(*, backend: str, **tensors: Tensor) -> dict[str, Tensor]:
        return {"image": training_crops(**tensors, size=size, clahe=clahe, backend=backend)}

    return Case("training_crops", name, make, call, prepare, network=network, seed=seed)


CASES = [
    _case("eight turns", [16] * 8, 16),
    _case("enlarged and reduced", [3, 7, 16, 21, 40], 16),
    _case("one pixel", [1], 5),
    _case("equalized, part tiles", [90] * 3, 90, clahe=True),
    _case("equalized, smaller than a tile", [21] * 5, 21, clahe=True),
    _case("base, 32 x 512 px", [512, 256, 300, 400] * 8, 512, network=True),
    _case("base, 32 x 512 px, equalized", [512, 256, 300, 400] * 8, 512, clahe=True, network=True),
]
