"""The operations between matrix products at the shapes of production: residual LayerNorm, GELU, ReLU.

Axes: B batch, N rows of an image, C channels, H hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_engine.bench.cases import Case, Inputs, Setting, leaves, random_from, works
from affmae_kernels.bias_gelu import bias_gelu
from affmae_kernels.linear_relu import linear_relu
from affmae_kernels.residual_norm import residual_norm


def norm_case(setting: Setting, rows: int, dim: int) -> Case:
    """As between two layers: a branch and the bias of its linear layer join; no dropout, which backends draw apart."""

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        features = {name: random(setting.batch, rows, dim).to(dtype) for name in ("x", "branch")}
        parameters = {"weight": 1 + 0.1 * random(dim), "bias": random(dim), "offset": random(dim)}
        return Inputs(leaves(features), leaves(parameters), {})

    def run(inputs: Inputs, backend: str) -> Tensor:
        f, p = inputs.features, inputs.parameters
        return residual_norm(f["x"], f["branch"], p["weight"], p["bias"], offset_C=p["offset"], backend=backend)[0]

    elements = setting.batch * rows * dim
    forward, backward = works(8 * setting.batch * rows, 4 * elements, 0, 3 * elements, 0)
    return Case("residual_norm", setting, f"B {setting.batch} N {rows} C {dim}", make, run, forward, backward)


def gelu_case(setting: Setting, rows: int, hidden: int) -> Case:
    """The seam of the encoder's MLP."""

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        features = {"x": random(setting.batch, rows, hidden).to(dtype)}
        return Inputs(leaves(features), leaves({"bias": random(hidden)}), {})

    def run(inputs: Inputs, backend: str) -> Tensor:
        return bias_gelu(inputs.features["x"], inputs.parameters["bias"], backend=backend)

    elements = setting.batch * rows * hidden
    forward, backward = works(0, 2 * elements, 0, 3 * elements, 0)
    return Case("bias_gelu", setting, f"B {setting.batch} N {rows} H {hidden}", make, run, forward, backward)


def relu_case(setting: Setting, rows: int, dim: int, hidden: int) -> Case:
    """The first half of the decoder's MLP. No sum is near 0, where rounding would decide on the slope."""

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        features = {"x": random(setting.batch, rows, dim).clamp(-3, 3).to(dtype)}
        parameters = {"weight": 0.2 / dim**0.5 * random(hidden, dim), "bias": 2 * random(hidden).sign()}
        return Inputs(leaves(features), leaves(parameters), {})

    def run(inputs: Inputs, backend: str) -> Tensor:
        p = inputs.parameters
        return linear_relu(inputs.features["x"], p["weight"], p["bias"], backend=backend)

    every = setting.batch * rows
    flops = 2 * every * dim * hidden
    elements = every * (dim + hidden) + dim * hidden
    forward, backward = works(0, elements, flops, elements + every * (2 * hidden + dim), 2 * flops)
    shape = f"B {setting.batch} N {rows} C {dim} H {hidden}"
    return Case("linear_relu", setting, shape, make, run, forward, backward)
