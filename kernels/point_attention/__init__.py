"""Point attention: deformable attention whose values live on scattered points instead of a grid (method 4).

Two calls: `nearest_table` once per set of tokens, `point_attention` in every layer that asks those tokens.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples, T = h * w canvas cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.point_attention import reference
from affmae_kernels.precision import without_autocast

__all__ = ["NearestTable", "nearest_table", "point_attention", "unsupported"]

GRID_LIMIT = 65_535
"""Most images of one launch: CUDA's limit on grid axes y and z."""
LARGEST_STRIDE = 2**15 - 1
"""Largest distance of two rows, in elements: the kernels' offsets within an image are 32-bit, and it has up to 65,536
rows."""


@dataclass(frozen=True)
class NearestTable:
    """The tokens nearest to every canvas cell. All but `table_BT4` is for the Triton kernels; None without them."""

    table_BT4: Tensor
    """int32 token rows for the T = h * w cells in canvas order, nearest first; -1 fills the end where there are fewer
    than 4 tokens."""
    packed_BT4: Tensor | None = None
    """int32: the same with the tokens' positions, token << 16 | y << 8 | x; -1 for no token."""
    entry_BE: Tensor | None = None
    """int32: the inverse. The E = 4 * T entries 4 * cell + k of the table in the order of their tokens, with bit 30 set
    in the first of each token; -1 fills the end where there are fewer than 4 tokens."""


def nearest_table(pos_BN2: Tensor, canvas_hw: tuple[int, int], *, backend: str = "auto") -> NearestTable:
    """The 4 tokens nearest to every canvas cell, by squared distance, then canvas index of the token.

    Args:
        pos_BN2: int32 (x, y) cells of the tokens, distinct within an image; N >= 1.
        canvas_hw: height and width of the canvas, in cells.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        The table. No gradients.

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    if pos_BN2.ndim != 3 or pos_BN2.shape[2] != 2 or pos_BN2.shape[1] < 1 or pos_BN2.dtype != torch.int32:
        raise ValueError(f"pos_BN2 must be int32 [B, N >= 1, 2]; got {pos_BN2.dtype} {tuple(pos_BN2.shape)}")
    choice = choose_backend(backend, "nearest_table", pos_BN2.device, _table_unsupported(pos_BN2, canvas_hw))
    if choice.name == "triton":
        from affmae_kernels.point_attention import triton_table

        return NearestTable(*triton_table.nearest_table(pos_BN2, canvas_hw))
    return NearestTable(reference.nearest_table(pos_BN2, canvas_hw))


def point_attention(
    value_BNHD: Tensor,
    pos_BN2: Tensor,
    table: NearestTable,
    query_pos_BQ2: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
    *,
    backend: str = "auto",
) -> Tensor:
    """out[q, h] = sum_s softmax_s(logit[q, h])_s * value at (query_pos + offset), where the value at a location is

        sum_i softmax_i(-relu(tau) * |location - pos_i|) * value[i, h],   i over the 4 nearest tokens of its cell

    The cell is the location rounded (halves to even) and clamped to the canvas; the location itself is not clamped.
    The gradient of a distance is 0 at distance 0. Everything but the values is computed in fp32 (float64 for float64
    features), also under autocast; a non-finite location is looked up at cell 0 and stays non-finite in the result.

    Values, offsets and logits may be slices of one wider matrix; the kernels do not copy them. They read fastest if its
    rows have a multiple of 16 elements.

    Args:
        value_BNHD: values of the tokens; any floating dtype.
        pos_BN2: int32 (x, y) cells of the tokens.
        table: of these tokens, from `nearest_table`.
        query_pos_BQ2: int32 (x, y) cells of the queries.
        offset_BQHS2: (x, y) offsets of the samples, in cells; floating.
        logit_BQHS: logits of the samples; floating.
        tau: one number, [] or [1]; floating.
        canvas_hw: height and width of the canvas, in cells.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        out_BQHD in the dtype of `value_BNHD`. Gradients: values, offsets, logits and tau.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(value_BNHD, pos_BN2, table.table_BT4, query_pos_BQ2, offset_BQHS2, logit_BQHS, tau, canvas_hw)
    _, queries, _, samples, _ = offset_BQHS2.shape
    obstacle = unsupported(value_BNHD.dtype, value_BNHD.shape, queries, samples, table)
    if any(x.dtype not in DTYPES for x in (offset_BQHS2, logit_BQHS, tau)):
        obstacle = f"offsets of {offset_BQHS2.dtype} (fp32, bf16 or fp16)"
    choice = choose_backend(backend, "point_attention", value_BNHD.device, obstacle)
    if choice.name == "triton":
        from affmae_kernels.point_attention import triton

        return triton.point_attention(value_BNHD, offset_BQHS2, logit_BQHS, table, query_pos_BQ2, tau, canvas_hw)
    with without_autocast(value_BNHD):
        return reference.point_attention(
            value_BNHD, pos_BN2, table.table_BT4, query_pos_BQ2, offset_BQHS2, logit_BQHS, tau, canvas_hw
        )


def _table_unsupported(pos_BN2: Tensor, canvas_hw: tuple[int, int]) -> str | None:
    """Why the kernel cannot make this table."""
    batch, tokens, _ = pos_BN2.shape
    if max(canvas_hw) > 256 or min(canvas_hw) < 1:
        return f"a canvas of {canvas_hw[0]} x {canvas_hw[1]} (at most 256 x 256)"
    if tokens > 65_535:
        return f"{tokens} tokens (at most 65,535)"
    if batch > GRID_LIMIT:
        return f"a batch of {batch} (at most {GRID_LIMIT:,})"
    return None


def unsupported(
    dtype: torch.dtype, value_shape: torch.Size, queries: int, samples: int, table: NearestTable
) -> str | None:
    """Why the kernels cannot take values [B, N, H, D] of this dtype and so many queries and samples; None: they can."""
    batch, _, heads, width = value_shape
    if table.packed_BT4 is None:
        return "a table that the reference made"
    if dtype not in DTYPES:
        return f"features of {dtype} (fp32, bf16 or fp16)"
    if width not in (16, 32, 64, 128):
        return f"a head width of {width} (16, 32, 64 or 128)"
    if samples != 4:
        return f"{samples} samples (4)"
    if not 1 <= queries <= 65_536:
        return f"{queries} queries (1 to 65,536)"
    if heads * width > LARGEST_STRIDE:
        return f"{heads} heads of {width} (at most {LARGEST_STRIDE:,} channels)"
    if batch > GRID_LIMIT:
        return f"a batch of {batch} (at most {GRID_LIMIT:,})"
    return None


def _check(
    value_BNHD: Tensor,
    pos_BN2: Tensor,
    table_BT4: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> None:
    if value_BNHD.ndim != 4 or not value_BNHD.is_floating_point():
        raise ValueError(f"value_BNHD must be floating [B, N, H, D]; got {value_BNHD.dtype} {list(value_BNHD.shape)}")
    if offset_BQHS2.ndim != 5:
        raise ValueError(f"offset_BQHS2 must be [B, Q, H, S, 2]; got {list(offset_BQHS2.shape)}")
    batch, tokens, heads, _ = value_BNHD.shape
    queries, samples = offset_BQHS2.shape[1], offset_BQHS2.shape[3]
    expected = {
        "pos_BN2": (pos_BN2, [batch, tokens, 2]),
        "table_BT4": (table_BT4, [batch, canvas_hw[0] * canvas_hw[1], 4]),
        "query_pos_BQ2": (query_pos_BQ2, [batch, queries, 2]),
        "offset_BQHS2": (offset_BQHS2, [batch, queries, heads, samples, 2]),
        "logit_BQHS": (logit_BQHS, [batch, queries, heads, samples]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for value_BNHD {list(value_BNHD.shape)} on a canvas of "
                f"{canvas_hw[0]} x {canvas_hw[1]}; got {list(tensor.shape)}"
            )
    if tau.numel() != 1:
        raise ValueError(f"tau must be one number; got {list(tau.shape)}")
