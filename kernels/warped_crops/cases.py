"""Cases of warped crops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.warped_crops import Planes, warped_crops


def _case(name: str, shapes: list[tuple[int, int]], size: int, *, network: bool = False, seed: int = 0) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        shape_B2 = torch.tensor(shapes, dtype=torch.int32)
        pixels_B = shape_B2.long().prod(1)
        total = int(pixels_B.sum())
        # In 1/64 pixels, up to half an image outside; whole numbers take no gradient.
        part_B2HW = torch.randint(-(2**20), 2**20, (len(shapes), 2, size, size), generator=random)
        place_B2HW = (part_B2HW * shape_B2[..., None, None] // 2**14 + 32 * shape_B2[..., None, None]).int()
        return {
            "gray_N": torch.randint(0, 256, (total,), generator=random, dtype=torch.uint8),
            "labels_N": torch.randint(0, 5, (total,), generator=random, dtype=torch.uint8),
            "offset_B": pixels_B.cumsum(0) - pixels_B,
            "shape_B2": shape_B2,
            "place_B2HW": place_B2HW,
        }

    def prepare(*, backend: str, **tensors: Tensor) -> dict[str, Any]:
        shape_B2, place_B2HW = tensors["shape_B2"], tensors.pop("place_B2HW")
        planes = Planes(**tensors, width_B=shape_B2[:, 1].contiguous(), start_B2=torch.zeros_like(shape_B2))
        intensity_B4 = torch.tensor([127.5, 60.0, 0.0, 0.0], device=place_B2HW.device).repeat(len(place_B2HW), 1)
        return {"planes": planes, "place_B2HW": place_B2HW / 64, "intensity_B4": intensity_B4}

    def call(*, backend: str, planes: Planes, place_B2HW: Tensor, intensity_B4: Tensor) -> dict[str, Tensor]:
        image, labels = warped_crops(planes, place_B2HW, intensity_B4, outside=-1, backend=backend)
        return {"image": image, "labels": labels}

    return Case("warped_crops", name, make, call, prepare, network=network, seed=seed)


CASES = [
    _case("several planes", [(20, 31), (7, 5), (64, 1)], 19),
    _case("one pixel", [(1, 1)], 3),
    _case("8 x 512 px", [(1024, 1024)] * 8, 512, network=True),
]
