"""Operations of a forward pass, counted from the shapes: what has to be computed, not what an implementation does.

A multiplication and an addition are two operations. Counted are matrix products and convolutions, attention (AFFMAE's
over 64 neighbours and the blank token, a ViT's over all tokens), the positional bias, the sampling of the decoder and
the gathering of the merging. Norms, activations, softmax and sorting are left out on both sides: they move bytes.

Unusual: AFFMAE's stem and its reference operations work with dense matrices that are mostly zero (or look rows up), so
a counter of matrix products sees other numbers there than the sparse formulas give. A `Part` therefore holds both:
`flops`, and `seen`, what `torch.utils.flop_counter.FlopCounterMode` counts on the reference path; a test compares that.

Letters: N tokens, C channels, A heads, M neighbours, P slots (N padded to whole clusters), Q queries, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from affmae_engine.bench.case import CLASSES, Case, mask_settings
from affmae_engine.config import ModelConfig
from affmae_engine.model.decoder import SAMPLES
from affmae_engine.model.heads import STEP_OF_HEAD
from affmae_engine.model.masking import visible_count
from affmae_engine.model.encoder import survivor_count
from affmae_engine.model.sizes import SIZES
from affmae_engine.model.encoder import LARGEST_MATRIX
from affmae_engine.model.vit_mae import MLP_RATIO, VIT_SIZES
from affmae_kernels.point_attention.reference import NEAREST

GEOMETRY = 5
"""dx, dy, d, dy/d, dx/d."""
MERGE_WEIGHTS = 4
"""Weighted sums that a survivor makes of its neighbourhood."""


@dataclass(frozen=True)
class Part:
    """Operations of one image in one part. seen: by the counter, on the reference path; the same unless said."""

    name: str
    flops: float
    seen: float


def forward_flops(case: Case) -> dict[str, float]:
    """Operations of the forward pass of one image, by part of the network."""
    sums: dict[str, float] = {}
    for part in parts(case):
        sums[part.name] = sums.get(part.name, 0.0) + part.flops
    return sums


def seen_flops(case: Case) -> float:
    """What FlopCounterMode counts for one image when the reference operations run."""
    return sum(part.seen for part in parts(case))


def parts(case: Case) -> Iterator[Part]:
    """Every part of the forward pass of one image; a name may come more than once."""
    cells = math.prod(case.canvas_hw)
    visible = visible_count(case.canvas_hw, mask_settings().ratio) if case.work == "pretrain" else cells
    queries = cells - visible if case.work == "pretrain" else cells
    values = case.network.patch_size**2 * (case.network.channels if case.work == "pretrain" else CLASSES)
    if case.model == "vit-mae":
        yield from _vit(case.network, visible, cells, queries, values)
    else:
        heads = 1 if case.work == "predict" else len(STEP_OF_HEAD)
        yield from _stem(case.network, visible, masked=case.work == "pretrain")
        yield from _affmae(case.network, visible, queries, values * heads)


def _vit(model: ModelConfig, visible: int, cells: int, queries: int, values: int) -> Iterator[Part]:
    size = VIT_SIZES[model.size]
    yield _linear("patch embedding", visible, model.patch_size**2 * model.channels, size.dim)
    for part, tokens, dim, depth in (
        ("encoder", 1 + visible, size.dim, size.depth),
        ("decoder", 1 + cells, size.decoder_dim, size.decoder_depth),
    ):
        if part == "decoder":
            yield _linear("decoder, linear", 1 + visible, size.dim, dim)
        for _ in range(depth):
            yield _linear(f"{part}, linear", tokens, dim, (4 + 2 * MLP_RATIO) * dim)
            yield _same(f"{part}, attention", 4 * tokens**2 * dim)
    yield _linear("heads", queries, size.decoder_dim, values)


def _affmae(model: ModelConfig, visible: int, queries: int, values: int) -> Iterator[Part]:
    size, tokens, stages = SIZES[model.size], visible, []
    for stage, dim in enumerate(size.dims):
        stages.append(tokens)
        slots = -(-tokens // model.cluster_size) * model.cluster_size
        near, near_slots = min(tokens, model.neighbours), min(slots, model.neighbours)
        for _ in range(size.depths[stage]):
            yield _linear("encoder, linear", tokens, dim, 4 * dim + 2 * int(dim * size.mlp_ratio))
            bias = 2 * tokens * GEOMETRY * size.heads[stage]
            yield Part(
                "encoder, attention",
                4 * tokens * (near + 1) * dim + bias * near,
                4 * tokens * slots * dim + 2 * tokens * dim + bias * near_slots,  # the blank value is no product
            )
        if stage + 1 < len(size.dims):
            kept = survivor_count(tokens, model.merge_keep)
            yield _linear("merging, linear", tokens, dim, 1)
            weights, gathered = 2 * kept * GEOMETRY * MERGE_WEIGHTS, 2 * MERGE_WEIGHTS * kept * dim
            yield Part("merging, gathering", (gathered + weights) * near, gathered * slots + weights * near_slots)
            yield _linear("merging, linear", kept, MERGE_WEIGHTS * dim, size.dims[stage + 1])
            tokens = kept
    dim, hidden = size.decoder_dim, round(size.decoder_dim * model.decoder_ffn_ratio)
    asked = size.decoder_heads * SAMPLES * 3  # two offsets and a logit
    for stage in reversed(range(len(stages))):
        yield _linear("decoder, linear", stages[stage], size.dims[stage], dim)
        yield _linear("decoder, linear", queries + stages[stage], dim, dim)  # values of both attentions
        yield _linear("decoder, linear", 2 * queries, dim, asked + dim)
        yield _linear("decoder, linear", queries, dim, 2 * hidden)
        sampled = 2 * queries * 2 * SAMPLES * NEAREST * dim  # both attentions; 16 rows a query and head
        yield Part("decoder, sampling", sampled, 0.0)  # a look-up there
    yield _linear("heads", queries, dim, values)


def _stem(model: ModelConfig, visible: int, *, masked: bool) -> Iterator[Part]:
    """Convolutions 3x3 of stride 2; where patches are masked, as matrix products of a patch with its rim."""
    dim, count = SIZES[model.size].dims[0], int(math.log2(model.patch_size))
    widths = [model.channels] + [dim // 2] * (count - 1) + [dim]
    for step in range(count):
        edge, inputs, outputs = model.patch_size >> step, widths[step], widths[step + 1]
        products = visible * (edge // 2) ** 2 * outputs
        taken, window = 9 * inputs, (edge + 1) ** 2 * inputs
        if masked and edge <= LARGEST_MATRIX:
            padded = window + (-window % 8 if step == 0 else 0)
            yield Part("patch embedding", 2.0 * products * taken, 2.0 * products * padded)
        else:
            yield _same("patch embedding", 2.0 * products * taken)


def _linear(name: str, rows: float, inputs: float, outputs: float) -> Part:
    return _same(name, 2.0 * rows * inputs * outputs)


def _same(name: str, flops: float) -> Part:
    return Part(name, flops, flops)
