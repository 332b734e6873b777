"""Cases of tile blending: tiles that overlap, reach beyond the planes on every side, lie outside, or are padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.tile_blending import blend_tiles


def _make(
    random: torch.Generator, dtype: torch.dtype, *, shape_ZCYX: tuple[int, int, int, int], batch: int, tile: int
) -> dict[str, Any]:
    sections, classes, height, width = shape_ZCYX
    origin_B3 = torch.stack(
        [
            torch.randint(-1, sections, (batch,), generator=random),
            torch.randint(-tile, height + 1, (batch,), generator=random),
            torch.randint(-tile, width + 1, (batch,), generator=random),
        ],
        1,
    )
    return {
        "sums": torch.rand(shape_ZCYX, generator=random),
        "tiles": torch.rand(batch, classes, tile, tile, generator=random).to(dtype),
        "weight_y": torch.rand(batch, tile, generator=random),
        "weight_x": torch.rand(batch, tile, generator=random),
        "origin": origin_B3.int(),
    }


def _prepare(*, backend: str, sums: Tensor, **arguments: Tensor) -> dict[str, Any]:
    return {"sums": sums.detach().clone(), **{name: tensor.detach() for name, tensor in arguments.items()}}


def _call(
    *, backend: str, sums: Tensor, tiles: Tensor, weight_y: Tensor, weight_x: Tensor, origin: Tensor
) -> dict[str, Tensor]:
    blend_tiles(sums, tiles, weight_y, weight_x, origin, backend=backend)
    return {"sums": sums}


def _case(name: str, shape_ZCYX: tuple[int, int, int, int], batch: int, tile: int, *, network: bool = False) -> Case:
    make = partial(_make, shape_ZCYX=shape_ZCYX, batch=batch, tile=tile)
    return Case("tile_blending", name, make, _call, _prepare, network=network)


CASES = [
    _case("one pixel", (1, 1, 1, 1), 3, 1),
    _case("2 sections of 19 x 141 pixels, tiles of 24", (2, 3, 19, 141), 9, 24),
    _case("3 sections of 70 x 33 pixels, tiles of 16", (3, 2, 70, 33), 12, 16),
    _case("section smaller than a tile of 40", (1, 5, 7, 9), 4, 40),
    _case("32 tiles of 512 px, 4 sections of 1024 px, 5 classes", (4, 5, 1024, 1024), 32, 512, network=True),
]
