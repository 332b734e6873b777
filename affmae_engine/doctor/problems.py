"""Small random problems for every operation, to be solved twice: on the user's device and exactly on the CPU.

Features have the dtype under test, parameters are fp32, as in training. What is unusual: offsets lie on a grid of 1/32
cell and never halfway between two cells, so that every precision looks a location up in the same cell; and operations
on whole numbers are compared with an answer to shuffled tokens, because the order of the tokens must not matter.

Axes: B batch, N tokens, C channels or nearest clusters, A heads, D head width, Q queries, K survivors, S samples,
T canvas cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affmae_kernels.bias_gelu import bias_gelu
from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.linear_relu import linear_relu
from affmae_kernels.neighbourhoods import build_neighbourhoods
from affmae_kernels.point_attention import nearest_table, point_attention
from affmae_kernels.residual_norm import residual_norm
from affmae_kernels.token_merging import merge_tokens

Tensors = dict[str, Tensor]
SAMPLES = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem; `asking` is the number of queries or survivors."""

    batch: int
    tokens: int
    canvas_hw: tuple[int, int]
    heads: int
    width: int
    asking: int


@dataclass(frozen=True)
class Problem:
    """Inputs on the CPU and what to do with them."""

    leaves: Tensors
    """Floating inputs, of which gradients are wanted."""
    fixed: Tensors
    """Whole numbers, as the device gets them."""
    fixed_exact: Tensors
    """The same, as the exact answer is computed from; shuffled where the order must not matter."""
    bind: Callable[[Tensors, Tensors, str], Callable[[], Any]]
    """bind(leaves, fixed, backend): what comes before the operation, done once; the result calls the operation."""
    view: Callable[[Any, Tensors], Tensors]
    """view(result, fixed): the tensors to compare, by name; none of them depends on the order of the tokens."""
    seed: int


Make = Callable[[Shape, torch.dtype, int], Problem]


def neighbourhoods_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Clusters and nearest clusters of scattered tokens; `dtype` plays no part."""

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        return lambda: build_neighbourhoods(fixed["pos"], shape.canvas_hw, backend=backend)

    def view(result: Any, fixed: Tensors) -> Tensors:
        order_BN, near = result
        taken_BN2 = fixed["pos"].gather(1, order_BN[..., None].expand(-1, -1, 2))
        return {"order": taken_BN2, "positions": near.pos_BN2, "nearest clusters": near.nearest_BNC}

    return _whole_numbers(shape, seed, bind, view)


def nearest_table_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """The 4 tokens nearest to every cell, compared by where they are; `dtype` plays no part."""

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        return lambda: nearest_table(fixed["pos"], shape.canvas_hw, backend=backend)

    def view(result: Any, fixed: Tensors) -> Tensors:
        table_BT4: Tensor = result.table_BT4
        row_BR1 = table_BT4.flatten(1).long()[..., None]
        place_BR2 = fixed["pos"].gather(1, row_BR1.clamp(min=0).expand(-1, -1, 2))
        return {"nearest tokens": place_BR2.masked_fill(row_BR1 < 0, -1)}

    return _whole_numbers(shape, seed, bind, view)


def cluster_attention_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Attention over neighbourhoods of scattered tokens."""
    random = _random(seed)
    heads, width = shape.heads, shape.width
    leaves = {
        "qkv": random(shape.batch, shape.tokens, 3, heads, width).to(dtype),
        "blank key": random(heads, width),
        "blank value": random(heads, width),
        "bias weight": 0.1 * random(heads, 5),
        "bias": 0.1 * random(heads),
    }

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        _, near = build_neighbourhoods(fixed["pos"], shape.canvas_hw, backend=backend)
        qkv_BN3AD, *parameters = leaves.values()
        return lambda: cluster_attention(qkv_BN3AD, near, *parameters, backend=backend)

    return _floating(leaves, {"pos": scattered(shape, seed)}, bind, seed)


def token_merging_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Survivors that gather their neighbourhoods; heads times width is the number of channels."""
    random = _random(seed)
    survivors_BK = random(shape.batch, shape.tokens).argsort(1)[:, : shape.asking].sort(1).values
    leaves = {
        "features": random(shape.batch, shape.tokens, shape.heads * shape.width).to(dtype),
        "score": random(shape.batch, shape.tokens).sigmoid(),
        "weight": 0.3 * random(4, 5),
        "bias": 0.3 * random(4),
        "norm weight": 1 + 0.1 * random(4),
        "norm bias": 0.1 * random(4),
    }

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        _, near = build_neighbourhoods(fixed["pos"], shape.canvas_hw, backend=backend)
        feat_BNC, score_BN, *parameters = leaves.values()
        return lambda: merge_tokens(feat_BNC, score_BN, fixed["survivors"], near, *parameters, backend=backend)

    return _floating(leaves, {"pos": scattered(shape, seed), "survivors": survivors_BK}, bind, seed)


def point_attention_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Queries that sample scattered tokens, also outside the canvas and, one sample in four, exactly on a cell."""
    random = _random(seed)
    asked = shape.batch, shape.asking, shape.heads, SAMPLES
    offset_BQAS2 = (1.5 * random(*asked, 2)).clamp(-3.9, 3.9)
    offset_BQAS2 = (16 * offset_BQAS2).floor() / 16 + 1 / 32
    offset_BQAS2[..., 0, :] = offset_BQAS2[..., 0, :].round()
    leaves = {
        "values": random(shape.batch, shape.tokens, shape.heads, shape.width).to(dtype),
        "offsets": offset_BQAS2.to(dtype),
        "logits": random(*asked).to(dtype),
        "tau": torch.full((1,), 0.7),
    }
    queries = Shape(shape.batch, shape.asking, shape.canvas_hw, shape.heads, shape.width, 0)

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        value_BNAD, offset_BQAS2, logit_BQAS, tau = leaves.values()
        table = nearest_table(fixed["pos"], shape.canvas_hw, backend=backend)
        asked = value_BNAD, fixed["pos"], table, fixed["queries"], offset_BQAS2, logit_BQAS, tau
        return lambda: point_attention(*asked, shape.canvas_hw, backend=backend)

    return _floating(leaves, {"pos": scattered(shape, seed), "queries": scattered(queries, seed + 1000)}, bind, seed)


def residual_norm_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Rows of heads times width channels, without dropout: every backend draws other numbers."""
    random = _random(seed)
    channels = shape.heads * shape.width
    leaves = {
        "x": random(shape.batch, shape.tokens, channels).to(dtype),
        "branch": random(shape.batch, shape.tokens, channels).to(dtype),
        "norm weight": 1 + 0.1 * random(channels),
        "norm bias": 0.1 * random(channels),
    }

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        x_BNC, branch_BNC, weight_C, bias_C = leaves.values()
        return lambda: residual_norm(x_BNC, branch_BNC, weight_C, bias_C, backend=backend)[0]

    return _floating(leaves, {}, bind, seed)


def bias_gelu_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Rows of heads times width channels."""
    random = _random(seed)
    channels = shape.heads * shape.width
    leaves = {"x": random(shape.batch, shape.tokens, channels).to(dtype), "bias": random(channels)}

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        return lambda: bias_gelu(leaves["x"], leaves["bias"], backend=backend)

    return _floating(leaves, {}, bind, seed)


def linear_relu_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Twice as many hidden channels. No sum is near 0, where rounding would decide on which side of the bend it is."""
    random = _random(seed)
    channels = shape.heads * shape.width
    leaves = {
        "x": random(shape.batch, shape.tokens, channels).clamp(-3, 3).to(dtype),
        "weight": 0.2 / channels**0.5 * random(2 * channels, channels),
        "bias": 2.0 * random(2 * channels).sign(),
    }

    def bind(leaves: Tensors, fixed: Tensors, backend: str) -> Callable[[], Any]:
        return lambda: linear_relu(leaves["x"], leaves["weight"], leaves["bias"], backend=backend)

    return _floating(leaves, {}, bind, seed)


def scattered(shape: Shape, seed: int) -> Tensor:
    """int32 [B, N, 2]: distinct random cells (x, y) in random order."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape.canvas_hw
    cells = [torch.randperm(height * width, generator=generator)[: shape.tokens] for _ in range(shape.batch)]
    index_BN = torch.stack(cells)
    return torch.stack([index_BN % width, index_BN // width], -1).int()


def _floating(leaves: Tensors, fixed: Tensors, bind: Callable[..., Callable[[], Any]], seed: int) -> Problem:
    return Problem(leaves, fixed, fixed, bind, lambda result, fixed: {"result": result}, seed)


def _whole_numbers(
    shape: Shape, seed: int, bind: Callable[..., Callable[[], Any]], view: Callable[[Any, Tensors], Tensors]
) -> Problem:
    pos_BN2 = scattered(shape, seed)
    return Problem({}, {"pos": pos_BN2}, {"pos": pos_BN2.flip(1)}, bind, view, seed)


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)
