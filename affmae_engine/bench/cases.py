"""What a case of the operations' benchmark is: a setting, its inputs, the least work, and how inputs are drawn.

Bytes are the least that has to move (every input read once, every output written once), operations are those of the
formula. Inputs are a function of a seed.

Axes: B batch, N tokens, V visible tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from affmae_engine.config import MaskConfig, ModelConfig
from affmae_engine.model.masking import draw_mask, visible_count
from affmae_engine.model.encoder import survivor_count
from affmae_engine.model.patches import cell_positions
from affmae_engine.model.sizes import SIZES
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.point_attention import NearestTable


@dataclass(frozen=True)
class Setting:
    """A size of model, an edge in pixels and a batch."""

    size: str
    resolution: int
    batch: int
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """Height and width of the canvas, in cells."""
        return self.resolution // self.model.patch_size, self.resolution // self.model.patch_size

    def tokens(self) -> list[int]:
        """Tokens of each stage."""
        counts = [visible_count(self.canvas_hw, self.mask.ratio)]
        for _ in SIZES[self.size].dims[1:]:
            counts.append(survivor_count(counts[-1], self.model.merge_keep))
        return counts


@dataclass(frozen=True)
class Inputs:
    """features: floating, a row per image. parameters: floating, shared by the images. fixed: whole numbers, a row per
    image. Gradients are wanted of features and parameters. near, table: made of "pos" in `fixed` by `structure`."""

    features: dict[str, Tensor]
    parameters: dict[str, Tensor]
    fixed: dict[str, Tensor]
    structure: Callable[[Tensor, str], Neighbourhoods | NearestTable] | None = None
    """From positions and a backend."""
    built: Neighbourhoods | NearestTable | None = None

    @property
    def near(self) -> Neighbourhoods:
        """Neighbourhoods of the tokens."""
        assert isinstance(self.built, Neighbourhoods)
        return self.built

    @property
    def table(self) -> NearestTable:
        """Table of the tokens nearest to each cell."""
        assert isinstance(self.built, NearestTable)
        return self.built

    def differentiable(self) -> dict[str, Tensor]:
        """What gradients are wanted of, by name."""
        return {**self.features, **self.parameters}

    def exact(self, images: list[int]) -> Inputs:
        """A float64 copy of some images, for the reference."""
        fixed = {name: tensor[images] for name, tensor in self.fixed.items()}
        return Inputs(
            {name: leaf(tensor.detach()[images].double()) for name, tensor in self.features.items()},
            {name: leaf(tensor.detach().double()) for name, tensor in self.parameters.items()},
            fixed,
            self.structure,
            self.structure(fixed["pos"], "reference") if self.structure else None,
        )


@dataclass(frozen=True)
class Work:
    """The least traffic in bytes, and the operations, of one call."""

    read_write: float
    flops: float


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `run` returns integers where there is nothing to differentiate."""

    op: str
    setting: Setting
    shape: str
    make: Callable[[int, torch.device, torch.dtype], Inputs]
    run: Callable[[Inputs, str], Tensor]
    forward: Callable[[int], Work]
    backward: Callable[[int], Work] | None = None
    """Work by bytes per feature element; None: no gradients."""


def positions(setting: Setting, tokens: int, seed: int, device: torch.device, *, masked: bool = False) -> Tensor:
    """int32 cells [B, tokens, 2]: visible (or masked) cells of Perlin masks, thinned out at random for later stages."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for image in range(setting.batch):
        cell_V = draw_mask(setting.canvas_hw, setting.mask, seed=seed, index=image)[masked]
        chosen = torch.randperm(len(cell_V), generator=generator)[:tokens]
        rows.append(cell_V[chosen.sort().values])
    return cell_positions(torch.stack(rows).to(device), setting.canvas_hw)


def works(
    index_bytes: float, elements: float, flops: float, backward_elements: float, backward_flops: float
) -> tuple[Callable[[int], Work], Callable[[int], Work]]:
    """Forward and backward `Work` by bytes per feature element, from elements and operations."""

    def forward(width: int) -> Work:
        return Work(index_bytes + width * elements, flops)

    def backward(width: int) -> Work:
        return Work(index_bytes + width * backward_elements, backward_flops)

    return forward, backward


def random_from(seed: int, device: torch.device) -> Callable[..., Tensor]:
    """randn of a shape, from a seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return draw


def leaf(tensor: Tensor) -> Tensor:
    """A copy of which gradients are wanted."""
    return tensor.detach().requires_grad_()


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Such copies, by name."""
    return {name: leaf(tensor) for name, tensor in tensors.items()}
