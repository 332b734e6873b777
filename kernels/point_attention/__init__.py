"""Point attention: deformable attention whose values live on scattered points instead of a grid (method 4).

Two calls: `nearest_table` once per set of tokens, `point_attention` in every layer that asks those tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.point_attention import reference

__all__ = ["nearest_table", "point_attention"]


def nearest_table(pos_BN2: Tensor, canvas_hw: tuple[int, int], *, backend: str = "auto") -> Tensor:
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
    choose_backend(backend, "point_attention", pos_BN2.device)
    return reference.nearest_table(pos_BN2, canvas_hw)


def point_attention(
    value_BNAD: Tensor,
    pos_BN2: Tensor,
    table_BT4: Tensor,
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
        table_BT4: of these tokens, from `nearest_table`.
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
    _check(value_BNAD, pos_BN2, table_BT4, query_pos_BQ2, offset_BQAS2, logit_BQAS, tau, canvas_hw)
    choose_backend(backend, "point_attention", value_BNAD.device)
    with torch.autocast(value_BNAD.device.type, enabled=False):
        return reference.point_attention(
            value_BNAD, pos_BN2, table_BT4, query_pos_BQ2, offset_BQAS2, logit_BQAS, tau, canvas_hw
        )


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
