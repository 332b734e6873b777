"""Which tokens the encoder sees: coherent holes from a Perlin noise field, or independent cells (method section 1).

A mask is a pure function of (seed, index), so that no worker, rank or resumed run can draw another one. The number of
visible tokens depends on the canvas and the ratio alone, so shapes are static.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affmae_engine.config import MaskConfig
from affmae_engine.errors import ConfigError

_STREAM = 0x6D61736B
"""Separates the random numbers of masks from those of other users of the same (seed, index)."""


def visible_count(canvas_hw: tuple[int, int], ratio: float) -> int:
    """Visible cells of a canvas when the share `ratio` is masked: floor(h * w * (1 - ratio) + 1e-9)."""
    return math.floor(canvas_hw[0] * canvas_hw[1] * (1 - ratio) + 1e-9)


def draw_mask(canvas_hw: tuple[int, int], config: MaskConfig, *, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """The mask of sample `index`.

    Returns:
        visible_V, masked_Q: int64 canvas indices, both in canvas order; together every cell once.

    Raises:
        ConfigError: when the ratio would leave nothing visible or nothing masked on this canvas.
    """
    cells = canvas_hw[0] * canvas_hw[1]
    count = visible_count(canvas_hw, config.ratio)
    if not 0 < count < cells:
        raise ConfigError(
            f"mask.ratio {config.ratio} leaves {count} of {cells} tokens visible on a canvas of "
            f"{canvas_hw[0]} x {canvas_hw[1]}",
            "take larger crops, a smaller patch or another ratio",
        )
    random = np.random.default_rng([seed, index, _STREAM])
    if config.kind == "perlin":
        field_hw = perlin_field(canvas_hw, config.lattices[index % len(config.lattices)], random)
    else:
        field_hw = random.random(canvas_hw)
    order_T = np.argsort(field_hw, axis=None, kind="stable")
    return torch.from_numpy(np.sort(order_T[:count])), torch.from_numpy(np.sort(order_T[count:]))


def restore_order(visible_BV: Tensor, masked_BQ: Tensor) -> Tensor:
    """The permutation that puts rows [visible, masked] back into canvas order: cat([v, m])[restore] is the canvas."""
    return torch.argsort(torch.cat([visible_BV, masked_BQ], -1), dim=-1)


def perlin_field(canvas_hw: tuple[int, int], lattice: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Gradient noise at every canvas cell, `lattice` lattice cells per side, at a random phase.

    The phase keeps the cells off the lattice points, where the noise is 0 whatever the gradients are.
    Source: Perlin, "Improving Noise", 2002 (quintic fade).
    """
    phase_y, phase_x = random.random(2)
    angle = random.uniform(0, 2 * np.pi, (lattice + 2, lattice + 2))
    gradient_x, gradient_y = np.cos(angle), np.sin(angle)
    y_h = (np.arange(canvas_hw[0]) + 0.5) / canvas_hw[0] * lattice + phase_y
    x_w = (np.arange(canvas_hw[1]) + 0.5) / canvas_hw[1] * lattice + phase_x
    row_h, column_w = y_h.astype(np.int64), x_w.astype(np.int64)
    v_h1, u_1w = (y_h - row_h)[:, None], (x_w - column_w)[None]

    def corner(down: int, right: int) -> NDArray[np.float64]:
        cell = np.ix_(row_h + down, column_w + right)
        return gradient_x[cell] * (u_1w - right) + gradient_y[cell] * (v_h1 - down)

    fade_u, fade_v = _fade(u_1w), _fade(v_h1)
    top = corner(0, 0) + fade_u * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + fade_u * (corner(1, 1) - corner(1, 0))
    return top + fade_v * (bottom - top)


def _fade(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return t**3 * (t * (6 * t - 15) + 10)
