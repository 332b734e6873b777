"""Cases of point attention and its table.

Offsets lie on a grid of 1/32 cell and never halfway between two cells, so that every precision looks a location up in
the same cell; one sample in four lies exactly on a cell.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples, C columns of one wide matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affmae_kernels.cases import Case
from affmae_kernels.point_attention import NearestTable, nearest_table, point_attention

SAMPLES = 4
NEAREST = 4
LARGEST_OFFSET = 3.9


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    batch: int
    tokens: int
    queries: int
    canvas_hw: tuple[int, int]
    heads: int
    width: int
    itself: bool = False
    """Whether the queries ask one another: their positions are those of the tokens."""
    spread: float = 1.5
    """Standard deviation of the offsets, in cells."""

    @property
    def channels(self) -> int:
        """Columns of all heads' values."""
        return self.heads * self.width

    @property
    def asked(self) -> int:
        """Columns of all heads' offsets and logits."""
        return self.heads * SAMPLES * 3


def _scattered(random: torch.Generator, batch: int, tokens: int, canvas_hw: tuple[int, int]) -> Tensor:
    """int32 [B, N, 2]: distinct random cells (x, y) in random order."""
    canvas_h, canvas_w = canvas_hw
    index_BN = torch.stack([torch.randperm(canvas_h * canvas_w, generator=random)[:tokens] for _ in range(batch)])
    return torch.stack([index_BN % canvas_w, index_BN // canvas_w], -1).int()


def _offsets(random: torch.Generator, shape: Shape) -> Tensor:
    """[B, Q, H, S, 2] on the grid, fp32."""
    offset_BQHS2 = torch.randn(shape.batch, shape.queries, shape.heads, SAMPLES, 2, generator=random) * shape.spread
    offset_BQHS2 = offset_BQHS2.clamp(-LARGEST_OFFSET, LARGEST_OFFSET)
    offset_BQHS2 = (16 * offset_BQHS2).floor() / 16 + 1 / 32
    offset_BQHS2[..., 0, :] = offset_BQHS2[..., 0, :].round()
    return offset_BQHS2


def _positions(random: torch.Generator, shape: Shape) -> dict[str, Any]:
    pos_BN2 = _scattered(random, shape.batch, shape.tokens, shape.canvas_hw)
    query_pos_BQ2 = pos_BN2 if shape.itself else _scattered(random, shape.batch, shape.queries, shape.canvas_hw)
    return {"pos": pos_BN2, "query_pos": query_pos_BQ2, "canvas_hw": shape.canvas_hw}


def _make(shape: Shape, tau: Tensor) -> Callable[[torch.Generator, torch.dtype], dict[str, Any]]:
    """Arguments as separate tensors."""

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        positions = _positions(random, shape)
        return positions | {
            "value": torch.randn(shape.batch, shape.tokens, shape.heads, shape.width, generator=random).to(dtype),
            "offset": _offsets(random, shape).to(dtype),
            "logit": torch.randn(shape.batch, shape.queries, shape.heads, SAMPLES, generator=random).to(dtype),
            "tau": tau.clone(),
        }

    return make


def _prepare(backend: str, **arguments: Any) -> dict[str, Any]:
    return arguments | {"table": nearest_table(arguments["pos"], arguments["canvas_hw"], backend=backend)}


def _call(
    backend: str,
    pos: Tensor,
    query_pos: Tensor,
    canvas_hw: tuple[int, int],
    table: NearestTable,
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    tau: Tensor,
) -> dict[str, Tensor]:
    out_BQHD = point_attention(value, pos, table, query_pos, offset, logit, tau, canvas_hw, backend=backend)
    return {"out": out_BQHD}


def _attention(name: str, shape: Shape, *, tau: Tensor | None = None, network: bool = False, seed: int = 0) -> Case:
    return Case(
        operation="point_attention",
        name=name,
        make=_make(shape, torch.tensor([0.7]) if tau is None else tau),
        prepare=_prepare,
        call=_call,
        network=network,
        flops=2 * shape.batch * shape.queries * shape.heads * SAMPLES * NEAREST * shape.width,
        seed=seed,
    )


def _slices(name: str, shape: Shape, padding: int, *, network: bool = False) -> Case:
    """Self-attention whose values, offsets and logits are slices of one matrix, with unused columns at the end."""

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        positions = _positions(random, shape)
        value_BNC = torch.randn(shape.batch, shape.tokens, shape.channels, generator=random)
        logit_BQC = torch.randn(shape.batch, shape.queries, shape.heads * SAMPLES, generator=random)
        unused_BNC = torch.zeros(shape.batch, shape.tokens, padding)
        wide_BNC = torch.cat([value_BNC, _offsets(random, shape).flatten(2), logit_BQC, unused_BNC], -1)
        return positions | {"wide": wide_BNC.to(dtype), "tau": torch.tensor([0.7])}

    def call(backend: str, wide: Tensor, **rest: Any) -> dict[str, Tensor]:
        offsets = shape.heads * SAMPLES * 2
        value_BNC, offset_BQC, logit_BQC, _ = wide.split([shape.channels, offsets, offsets // 2, padding], -1)
        return _call(
            backend,
            value=value_BNC.unflatten(-1, (shape.heads, shape.width)),
            offset=offset_BQC.unflatten(-1, (shape.heads, SAMPLES, 2)),
            logit=logit_BQC.unflatten(-1, (shape.heads, SAMPLES)),
            **rest,
        )

    flops = 2 * shape.batch * shape.queries * shape.heads * SAMPLES * NEAREST * shape.width
    return Case("point_attention", name, make, call, _prepare, network=network, flops=flops)


def _table(name: str, batch: int, tokens: int, canvas_hw: tuple[int, int], *, network: bool = False) -> Case:
    """The table of nearest tokens alone."""

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return {"pos": _scattered(random, batch, tokens, canvas_hw)}

    def call(backend: str, pos: Tensor) -> dict[str, Tensor]:
        return {"table": nearest_table(pos, canvas_hw, backend=backend).table_BT4}

    return Case("point_attention", name, make, call, network=network)


BATCH = 32
"""Of the base network at 512 px, of which half is hidden."""
CANVAS = (64, 64)
QUERIES = 2048
STAGE_TOKENS = (2048, 819, 327, 130)

CASES = [
    _table("table of 7 tokens", 2, 7, (6, 2)),
    _table("table of 3 tokens", 2, 3, (5, 3)),
    _table("table of 1 token", 1, 1, (2, 4)),
    _table("table of 30 tokens on a wide canvas", 1, 30, (1, 140)),
    _attention("self, every cell", Shape(1, 20, 20, (4, 5), 2, 16, itself=True)),
    _attention("cross, heads of 32", Shape(2, 5, 11, (3, 5), 1, 32)),
    _attention("cross, heads of 64, tau []", Shape(1, 9, 5, (9, 2), 2, 64), tau=torch.tensor(1.3)),
    _attention("cross, heads of 128", Shape(2, 6, 3, (4, 5), 1, 128)),
    _attention("cross, 3 tokens", Shape(2, 3, 7, (4, 5), 1, 16)),
    _attention("cross, 2 tokens", Shape(1, 2, 15, (4, 5), 2, 16)),
    _attention("cross, far offsets", Shape(1, 6, 9, (4, 5), 1, 16, spread=6.0)),
    _attention("cross, table of 2 blocks", Shape(1, 20, 6, (9, 30), 1, 16)),
    _slices("slices of rows of 50", Shape(2, 9, 9, (4, 5), 1, 32, itself=True), padding=6),
    _slices("slices of rows of 64", Shape(1, 9, 9, (4, 5), 1, 32, itself=True), padding=20),
    *(_table(f"table of {n} tokens", BATCH, n, CANVAS, network=True) for n in STAGE_TOKENS),
    _attention("self, base", Shape(BATCH, QUERIES, QUERIES, CANVAS, 6, 64, itself=True), network=True),
    _slices("self, base, slices", Shape(BATCH, QUERIES, QUERIES, CANVAS, 6, 64, itself=True), padding=8, network=True),
    *(
        _attention(f"cross, base, {n} tokens", Shape(BATCH, n, QUERIES, CANVAS, 6, 64), network=True)
        for n in STAGE_TOKENS
    ),
]
