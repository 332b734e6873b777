"""How weights start where the method does not say: truncated normal 0.02 and zero biases, as transformers do."""

from __future__ import annotations

from torch import nn

STD = 0.02


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with truncated-normal weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias, as deformable attention starts its projections."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
