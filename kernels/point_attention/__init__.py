"""Point attention: deformable attention whose values live on scattered points instead of a grid (method 4).

Two calls: `nearest_table` once per set of tokens, `point_attention` in every layer that asks those tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.point_attention import reference

__all__ = ["NearestTable", "nearest_table", "point_attention"]


@dataclass(frozen=True)
class NearestTable:
    """The tokens nearest to every canvas cell. All but `table_BT4` is for the Triton kernels; None without them."""

    table_BT4: Tensor
    """int32 token rows for the T = h * w cells in canvas order, nearest first; -1 fills the end where there are fewer
    than 4 tokens."""
    packed_BT4: Tensor | None = None
    """int32: the same with the tokens' positions, token << 16 | y << 8 | x."""
    entry_BE: Tensor | None = None
    """int32: the entries 4 * cell + k of the table in the order of their tokens."""
    first_BN: Tensor | None = None
    """int32: the first entry of every token."""


def nearest_table(pos_BN2: Tensor, canvas_hw: tuple[int, int], *, backend: str = "auto") -> NearestTable:
    """The 4 tokens nearest to every canvas cell, by squared distance, then canvas index of the token.

    Args:
        pos_BN2: int32 (x, y) cells of the tokens, distinct within an image; N >= 1.
        canvas_hw: height and width of the canvas, in cells.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        table_BT4: int32 token rows for the T = h * w cells in canvas order, nearest first; -1 fills the end where
        there are fewer than 4 tokens. No gradients.

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    if pos_BN2.ndim != 3 or pos_BN2.shape[2] != 2 or pos_BN2.shape[1] < 1 or pos_BN2.dtype != torch.int32:
        raise ValueError(f"pos_BN2 must be int32 [B, N >= 1, 2]; got {pos_BN2.dtype} {tuple(pos_BN2.shape)}")
    choice = choose_backend(backend, "nearest_table", pos_BN2.device, _table_unsupported(pos_BN2, canvas_hw))
    if choice.name == "triton":
        from affmae_kernels.point_attention import triton_table

        return NearestTable(*triton_table.nearest_table(pos_BN2, *canvas_hw))
    return NearestTable(reference.nearest_table(pos_BN2, canvas_hw))


def point_attention(
    value_BNAD: Tensor,
    pos_BN2: Tensor,
    table: NearestTable,
    query_pos_BQ2: Tensor,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
    *,
    backend: str = "auto",
) -> Tensor:
    """out[q, a] = sum_s softmax_s(logit[q, a])_s * value at (query_pos + offset), where the value at a location is

        sum_i softmax_i(-relu(tau) * |location - pos_i|) * value[i, a],   i over the 4 nearest tokens of its cell

    The cell is the location rounded (halves to even) and clamped to the canvas; the location itself is not clamped.
    The gradient of a distance is 0 at distance 0. Everything but the values is computed in fp32 (float64 for float64
    features), also under autocast; a non-finite location is looked up at cell 0 and stays non-finite in the result.

    Args:
        value_BNAD: values of the tokens; any floating dtype.
        pos_BN2: int32 (x, y) cells of the tokens.
        table: of these tokens, from `nearest_table`.
        query_pos_BQ2: int32 (x, y) cells of the queries.
        offset_BQAS2: (x, y) offsets of the samples, in cells; floating.
        logit_BQAS: logits of the samples; floating.
        tau: one number, [] or [1]; floating.
        canvas_hw: height and width of the canvas, in cells.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        out_BQAD in the dtype of `value_BNAD`. Gradients: values, offsets, logits and tau.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(value_BNAD, pos_BN2, table.table_BT4, query_pos_BQ2, offset_BQAS2, logit_BQAS, tau, canvas_hw)
    unsupported = _unsupported(value_BNAD, table, offset_BQAS2, logit_BQAS, tau, canvas_hw)
    choice = choose_backend(backend, "point_attention", value_BNAD.device, unsupported)
    with torch.autocast(value_BNAD.device.type, enabled=False):
        if choice.name == "triton":
            from affmae_kernels.point_attention import triton_impl

            tables = (table.packed_BT4, table.entry_BE, table.first_BN)
            queries = (query_pos_BQ2, offset_BQAS2, logit_BQAS)
            return triton_impl.point_attention(value_BNAD, *tables, *queries, tau, *canvas_hw)
        return reference.point_attention(
            value_BNAD, pos_BN2, table.table_BT4, query_pos_BQ2, offset_BQAS2, logit_BQAS, tau, canvas_hw
        )


def _table_unsupported(pos_BN2: Tensor, canvas_hw: tuple[int, int]) -> str | None:
    """Why the kernel cannot make this table."""
    batch, tokens, _ = pos_BN2.shape
    if max(canvas_hw) > 256 or min(canvas_hw) < 1:
        return f"a canvas of {canvas_hw[0]} x {canvas_hw[1]} (at most 256 x 256)"
    if tokens > 65_535:
        return f"{tokens} tokens (at most 65,535)"
    if batch > 65_535 or batch * canvas_hw[0] * canvas_hw[1] * 4 >= 2**31:
        return f"a batch of {batch} (offsets are 32-bit)"
    return None


def _unsupported(
    value_BNAD: Tensor,
    table: NearestTable,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> str | None:
    """Why the kernels cannot take these arguments."""
    batch, tokens, heads, width = value_BNAD.shape
    _, queries, _, samples, _ = offset_BQAS2.shape
    if table.packed_BT4 is None:
        return "a table that the reference made"
    if any(x.dtype not in DTYPES for x in (value_BNAD, offset_BQAS2, logit_BQAS, tau)):
        return f"{value_BNAD.dtype} values with {offset_BQAS2.dtype} offsets (fp32, bf16 or fp16)"
    if width not in (16, 32, 64, 128):
        return f"a head width of {width} (16, 32, 64 or 128)"
    if samples != 4:
        return f"{samples} samples (4)"
    if not 1 <= queries <= 65_536:
        return f"{queries} queries (1 to 65,536)"
    if batch * heads * max(queries * width, tokens * width, canvas_hw[0] * canvas_hw[1] * 4) >= 2**31:
        return f"a batch of {batch} of that size (offsets are 32-bit)"
    return None


def _check(
    value_BNAD: Tensor,
    pos_BN2: Tensor,
    table_BT4: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> None:
    if value_BNAD.ndim != 4 or not value_BNAD.is_floating_point():
        raise ValueError(f"value_BNAD must be floating [B, N, A, D]; got {value_BNAD.dtype} {list(value_BNAD.shape)}")
    if offset_BQAS2.ndim != 5:
        raise ValueError(f"offset_BQAS2 must be [B, Q, A, S, 2]; got {list(offset_BQAS2.shape)}")
    batch, tokens, heads, _ = value_BNAD.shape
    queries, samples = offset_BQAS2.shape[1], offset_BQAS2.shape[3]
    expected = {
        "pos_BN2": (pos_BN2, [batch, tokens, 2]),
        "table_BT4": (table_BT4, [batch, canvas_hw[0] * canvas_hw[1], 4]),
        "query_pos_BQ2": (query_pos_BQ2, [batch, queries, 2]),
        "offset_BQAS2": (offset_BQAS2, [batch, queries, heads, samples, 2]),
        "logit_BQAS": (logit_BQAS, [batch, queries, heads, samples]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for value_BNAD {list(value_BNAD.shape)} on a canvas of "
                f"{canvas_hw[0]} x {canvas_hw[1]}; got {list(tensor.shape)}"
            )
    if tau.numel() != 1:
        raise ValueError(f"tau must be one number; got {list(tau.shape)}")
