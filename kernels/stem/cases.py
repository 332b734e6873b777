"""Cases of the patch embedding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.stem import stem


def _case(
    name: str,
    batch: int,
    canvas_hw: tuple[int, int],
    visible: int | None,
    *,
    channels: int = 1,
    patch: int = 8,
    width: int = 32,
    network: bool = False,
) -> Case:
    """`visible` patches in random order, None: every cell without a list; `width`: channels of the result."""
    height, columns = canvas_hw
    count = patch.bit_length() - 1
    widths = [channels] + [width // 2] * (count - 1) + [width]
    tokens = height * columns if visible is None else visible

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        made: dict[str, Any] = {
            "image_BIHW": torch.randn(
                batch, channels, height * patch, columns * patch, generator=random, dtype=torch.float32
            ).to(dtype),
            "convs": [
                (torch.randn(b, a, 3, 3, generator=random) * (9 * a) ** -0.5, torch.randn(b, generator=random) * 0.3)
                for a, b in pairwise(widths)
            ],
            "norms": [
                (1 + torch.randn(b, generator=random) * 0.3, torch.randn(b, generator=random) * 0.3) for b in widths[1:]
            ],
        }
        if visible is not None:
            order = [torch.randperm(height * columns, generator=random)[:visible] for _ in range(batch)]
            made["visible_BV"] = torch.stack(order)
        return made

    def call(
        *, image_BIHW: Tensor, convs: Any, norms: Any, backend: str, visible_BV: Tensor | None = None
    ) -> dict[str, Tensor]:
        # The kernels give no gradient for the image.
        return {"feat_BVC": stem(image_BIHW.detach(), visible_BV, convs, norms, patch, backend=backend)}

    # Per patch and layer: edge^2 outputs of 9 taps.
    products = sum((patch >> i + 1) ** 2 * 9 * a * b for i, (a, b) in enumerate(pairwise(widths)))
    return Case("stem", name, make, call, network=network, flops=2 * batch * tokens * products)


CASES = [
    _case("2 images, 5 x 4 canvas, 11 visible", 2, (5, 4), 11),
    _case("every cell of 3 x 5, shuffled", 1, (3, 5), 15, channels=3),
    _case("every cell of 4 x 3, no list", 2, (4, 3), None),
    _case("1 visible of 6", 2, (1, 6), 1),
    _case("one column, 4 visible of 7", 1, (7, 1), 4, channels=4),
    _case("patch 16, 2 channels, 5 of 8", 1, (4, 2), 5, channels=2, patch=16),
    _case("48 and 96 channels", 1, (3, 2), 4, width=96),
    _case("base, 4 x 512 px, half visible", 4, (64, 64), 2048, width=128, network=True),
    _case("base, 2 x 512 px, every cell", 2, (64, 64), None, width=128, network=True),
]
