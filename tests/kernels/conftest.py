"""Scattered points and poisoned memory for the tests of the operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._device
from torch import Tensor

Scatter = Callable[..., Tensor]


@pytest.fixture
def scatter() -> Scatter:
    """scatter(batch, tokens, (h, w), seed=0): int32 [B, N, 2] distinct random cells in random order."""

    def points(batch: int, tokens: int, canvas_hw: tuple[int, int], seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        cells = canvas_hw[0] * canvas_hw[1]
        index_BN = torch.stack([torch.randperm(cells, generator=generator)[:tokens] for _ in range(batch)])
        return torch.stack([index_BN % canvas_hw[1], index_BN // canvas_hw[1]], -1).int()

    return points


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows up as NaN."""
    # PyTorch remembers, once, which functions make tensors: it must not remember ours.
    torch.utils._device._device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def filled(*args: Any, real: Callable[..., Tensor] = real, **options: Any) -> Tensor:
            made = real(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, filled)
