"""Every operation at the shapes of production: four stages, base and small, 512 and 1024 pixels, rho 0.4.

Features have the benchmark's dtype, parameters are fp32, as in training.

Axes: B batch, N tokens, C channels, A heads, D head width, Q queries, S samples, M neighbours, T canvas cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from affmae_engine.bench.cases import Case, Inputs, Setting, Work, leaves, positions, random_from, works
from affmae_engine.bench.seam_cases import gelu_case, norm_case, relu_case
from affmae_engine.model.decoder import SAMPLES
from affmae_engine.model.sizes import SIZES
from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.neighbourhoods import Neighbourhoods, build_neighbourhoods
from affmae_kernels.point_attention import NearestTable, nearest_table, point_attention
from affmae_kernels.token_merging import merge_tokens

OPERATIONS = (
    "neighbourhoods",
    "cluster_attention",
    "token_merging",
    "nearest_table",
    "point_attention",
    "residual_norm",
    "bias_gelu",
    "linear_relu",
)
NEAREST = 4


def all_cases(settings: list[Setting], operations: tuple[str, ...] = OPERATIONS) -> list[Case]:
    """The cases of some settings; what does not depend on the size of the model appears once."""
    cases: dict[tuple[str, str, int], Case] = {}
    for setting in settings:
        for case in _cases_of(setting):
            if case.op in operations:
                cases.setdefault((case.op, case.shape, setting.resolution), case)
    return sorted(cases.values(), key=lambda case: OPERATIONS.index(case.op))


def _cases_of(setting: Setting) -> list[Case]:
    size, counts = SIZES[setting.size], setting.tokens()
    queries = math.prod(setting.canvas_hw) - counts[0]
    cases = []
    for stage, tokens in enumerate(counts):
        cases.append(_build_case(setting, tokens))
        cases.append(_attention_case(setting, tokens, size.heads[stage], size.dims[stage]))
        cases.append(norm_case(setting, tokens, size.dims[stage]))
        cases.append(gelu_case(setting, tokens, int(size.dims[stage] * size.mlp_ratio)))
        if stage + 1 < len(counts):
            cases.append(_merge_case(setting, tokens, counts[stage + 1], size.dims[stage]))
    cases.append(_point_case(setting, None, queries, size.decoder_heads, size.decoder_dim))
    cases.append(norm_case(setting, queries, size.decoder_dim))
    cases.append(relu_case(setting, queries, size.decoder_dim, int(size.decoder_dim * setting.model.decoder_ffn_ratio)))
    for tokens in counts:
        cases.append(_table_case(setting, tokens))
        cases.append(_point_case(setting, tokens, queries, size.decoder_heads, size.decoder_dim))
    return cases


def _build_case(setting: Setting, tokens: int) -> Case:
    rows = setting.batch * tokens
    clusters = setting.model.neighbours // setting.model.cluster_size

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        return Inputs({}, {}, {"pos": positions(setting, tokens, seed, device)})

    def run(inputs: Inputs, backend: str) -> Tensor:
        order_BN, near = build_neighbourhoods(
            inputs.fixed["pos"], setting.canvas_hw, backend=backend, **_clustering(setting)
        )
        return torch.cat([order_BN[..., None].int(), near.pos_BN2, near.nearest_BNC], -1)

    work = Work(rows * (8 + 8 + 8 + 4 * clusters), 0)
    return Case("neighbourhoods", setting, f"B {setting.batch} N {tokens}", make, run, lambda width: work)


def _attention_case(setting: Setting, tokens: int, heads: int, dim: int) -> Case:
    batch, width = setting.batch, dim // heads
    rows, clusters = batch * tokens, setting.model.neighbours // setting.model.cluster_size
    pairs = min(setting.model.neighbours, tokens) + 1

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        structure, fixed, near = _neighbourhoods(setting, tokens, seed, device)
        parameters = {
            "blank_key": random(heads, width),
            "blank_value": random(heads, width),
            "bias_weight": 0.1 * random(heads, 5),
            "bias": 0.1 * random(heads),
        }
        features = {"qkv": random(batch, tokens, 3, heads, width).to(dtype)}
        return Inputs(leaves(features), leaves(parameters), fixed, structure, near)

    def run(inputs: Inputs, backend: str) -> Tensor:
        p = inputs.parameters
        blank, bias = (p["blank_key"], p["blank_value"]), (p["bias_weight"], p["bias"])
        return cluster_attention(inputs.features["qkv"], inputs.near, *blank, *bias, backend=backend)

    index_bytes, flops = rows * (8 + 4 * clusters), 4 * rows * pairs * dim
    shape = f"B {batch} N {tokens} A {heads} D {width}"
    forward, backward = works(index_bytes, 4 * rows * dim, flops, 8 * rows * dim, 2.5 * flops)
    return Case("cluster_attention", setting, shape, make, run, forward, backward)


def _merge_case(setting: Setting, tokens: int, survivors: int, dim: int) -> Case:
    batch = setting.batch

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        structure, fixed, near = _neighbourhoods(setting, tokens, seed, device)
        kept_BK = random(batch, tokens).argsort(1)[:, :survivors].sort(1).values
        features = {"feat": random(batch, tokens, dim).to(dtype), "score": random(batch, tokens).sigmoid()}
        parameters = {
            "weight": 0.3 * random(4, 5),
            "bias": 0.3 * random(4),
            "norm_weight": 1 + 0.1 * random(4),
            "norm_bias": 0.1 * random(4),
        }
        fixed["survivors"] = kept_BK
        return Inputs(leaves(features), leaves(parameters), fixed, structure, near)

    def run(inputs: Inputs, backend: str) -> Tensor:
        p, f = inputs.parameters, inputs.features
        linear, norm = (p["weight"], p["bias"]), (p["norm_weight"], p["norm_bias"])
        kept_BK = inputs.fixed["survivors"]
        return merge_tokens(f["feat"], f["score"], kept_BK, inputs.near, *linear, *norm, backend=backend)

    rows, kept = batch * tokens, batch * survivors
    index_bytes = rows * (8 + 4) + kept * (8 + 4 * setting.model.neighbours // setting.model.cluster_size)
    elements, flops = rows * dim + 4 * kept * dim, 8 * kept * min(setting.model.neighbours, tokens) * dim
    shape = f"B {batch} N {tokens} K {survivors} C {dim}"
    forward, backward = works(index_bytes, elements, flops, elements + rows * dim, 2 * flops)
    return Case("token_merging", setting, shape, make, run, forward, backward)


def _table_case(setting: Setting, tokens: int) -> Case:
    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        return Inputs({}, {}, {"pos": positions(setting, tokens, seed, device)})

    def run(inputs: Inputs, backend: str) -> Tensor:
        return nearest_table(inputs.fixed["pos"], setting.canvas_hw, backend=backend).table_BT4

    work = Work(setting.batch * (8 * tokens + 16 * math.prod(setting.canvas_hw)), 0)
    return Case("nearest_table", setting, f"B {setting.batch} N {tokens}", make, run, lambda width: work)


def _point_case(setting: Setting, source: int | None, queries: int, heads: int, dim: int) -> Case:
    """Queries ask `source` tokens of a stage, or one another when that is None."""
    batch, width, tokens = setting.batch, dim // heads, queries if source is None else source

    def structure(pos_BN2: Tensor, backend: str) -> NearestTable:
        return nearest_table(pos_BN2, setting.canvas_hw, backend=backend)

    def make(seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        random = random_from(seed, device)
        query_BQ2 = positions(setting, queries, seed, device, masked=True)
        pos_BN2 = query_BQ2 if source is None else positions(setting, tokens, seed, device)
        # On a grid of 1/64 cell, so that every precision rounds a location to the same cell.
        offset = (64 * (ring_offsets(heads, device) + 1.5 * random(batch, queries, heads, SAMPLES, 2))).round() / 64
        features = {
            "value": random(batch, tokens, heads, width).to(dtype),
            "offset": offset.to(dtype),
            "logit": random(batch, queries, heads, SAMPLES).to(dtype),
        }
        fixed, tau = {"pos": pos_BN2, "query": query_BQ2}, torch.full((1,), 2.0, device=device)
        return Inputs(leaves(features), leaves({"tau": tau}), fixed, structure, structure(pos_BN2, "auto"))

    def run(inputs: Inputs, backend: str) -> Tensor:
        f, fixed, tau = inputs.features, inputs.fixed, inputs.parameters["tau"]
        asked = f["value"], fixed["pos"], inputs.table, fixed["query"]
        return point_attention(*asked, f["offset"], f["logit"], tau, setting.canvas_hw, backend=backend)

    index_bytes = batch * (8 * tokens + 8 * queries + 16 * math.prod(setting.canvas_hw))
    asked = batch * queries * heads * SAMPLES
    elements = batch * tokens * dim + batch * queries * dim + 3 * asked
    flops = 2 * asked * NEAREST * width
    forward, backward = works(index_bytes, elements, flops, elements + batch * tokens * dim + 3 * asked, 2 * flops)
    kind = "self" if source is None else f"cross N {tokens}"
    shape = f"B {batch} Q {queries} {kind} A {heads} D {width}"
    return Case("point_attention", setting, shape, make, run, forward, backward)


def ring_offsets(heads: int, device: torch.device) -> Tensor:
    """[A, S, 2] offsets as training starts with them: s cells in the direction of each head."""
    angle_A = torch.arange(heads, device=device) * (2 * math.pi / heads)
    direction_A2 = torch.stack([angle_A.cos(), angle_A.sin()], -1)
    return direction_A2[:, None] * torch.arange(1, SAMPLES + 1, device=device)[:, None]


def _clustering(setting: Setting) -> dict[str, int]:
    return {"cluster_size": setting.model.cluster_size, "neighbours": setting.model.neighbours}


def _neighbourhoods(
    setting: Setting, tokens: int, seed: int, device: torch.device
) -> tuple[Callable[[Tensor, str], Neighbourhoods], dict[str, Tensor], Neighbourhoods]:
    """How neighbourhoods are made, and "pos" in cluster order with its neighbourhoods. The order keeps itself."""

    def structure(pos_BN2: Tensor, backend: str) -> Neighbourhoods:
        return build_neighbourhoods(pos_BN2, setting.canvas_hw, backend=backend, **_clustering(setting))[1]

    near = structure(positions(setting, tokens, seed, device), "auto")
    return structure, {"pos": near.pos_BN2}, near
