"""Point attention in plain PyTorch: a brute-force table with whole-number keys, and a weighted bag of value rows.

Memory: the table builds one key per (cell, token) pair in tiles of at most `TILE_ELEMENTS / 4` keys. The attention
keeps its weights, [B, Q, A, S, 4] fp32 and a few temporaries of that size (512 px: 0.8 MB an image each), and never
gathers the value rows themselves: `embedding_bag` sums them on the way. On CUDA the gradient of the values is a sum
in an order that sorting fixes.

Axes: B batch, N tokens, A heads, D head width, Q queries, S samples, T canvas cells, R = S * 4 rows mixed per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affmae_kernels.precision import TILE_ELEMENTS, compute_dtype

NEAREST = 4
"""Tokens between which a location is interpolated."""


@torch.no_grad()
def nearest_table(pos_BN2: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """See the package. The key is squared distance * T + canvas index of the token: exact and without ties."""
    height, width = canvas_hw
    batch, tokens, _ = pos_BN2.shape
    cells = height * width
    # int32 where the largest key fits halves the traffic; same result.
    dtype = torch.int32 if (height**2 + width**2) * cells < 2**31 else torch.int64
    token_x_BN, token_y_BN = pos_BN2.to(dtype).unbind(-1)
    canvas_BN = token_y_BN * width + token_x_BN

    def search(start: int, stop: int) -> Tensor:
        cell_t = torch.arange(start, stop, device=pos_BN2.device, dtype=dtype)
        x_t1, y_t1 = (cell_t % width)[:, None], (cell_t // width)[:, None]
        key_BtN = (token_x_BN[:, None] - x_t1).square_() + (token_y_BN[:, None] - y_t1).square_()
        key_BtN = key_BtN.mul_(cells).add_(canvas_BN[:, None])
        return key_BtN.topk(min(NEAREST, tokens), dim=-1, largest=False, sorted=True).indices.int()

    step = max(1, TILE_ELEMENTS // 4 // (batch * tokens))
    table_BTn = torch.cat([search(t, min(t + step, cells)) for t in range(0, cells, step)], 1)
    return F.pad(table_BTn, (0, NEAREST - table_BTn.shape[-1]), value=-1)


def point_attention(
    value_BNAD: Tensor,
    pos_BN2: Tensor,
    table_BT4: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQAS2: Tensor,
    logit_BQAS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(value_BNAD)
    batch, tokens, heads, width = value_BNAD.shape
    _, queries, _, samples = logit_BQAS.shape
    location_BQAS2 = query_pos_BQ2[:, :, None, None].to(dtype) + offset_BQAS2.to(dtype)
    row_BQAS4 = _take(table_BT4, _cell(location_BQAS2.detach(), canvas_hw))
    real_BQAS4 = row_BQAS4 >= 0
    row_BQAS4 = row_BQAS4.clamp(min=0).long()
    token_BQAS42 = _take(pos_BN2, row_BQAS4).to(dtype)
    distance_BQAS4 = _distance(location_BQAS2[..., None, :] - token_BQAS42)
    closeness_BQAS4 = (-tau.to(dtype).relu() * distance_BQAS4).masked_fill(~real_BQAS4, float("-inf"))
    share_BQAS4 = closeness_BQAS4.softmax(-1) * logit_BQAS.to(dtype).softmax(-1)[..., None]
    head_A11 = torch.arange(heads, device=value_BNAD.device)[:, None, None]
    image_B1111 = torch.arange(batch, device=value_BNAD.device)[:, None, None, None, None]
    flat_BQAS4 = (image_B1111 * tokens + row_BQAS4) * heads + head_A11
    out_RD = F.embedding_bag(
        flat_BQAS4.reshape(-1, samples * NEAREST),
        value_BNAD.to(dtype).reshape(-1, width),
        mode="sum",
        per_sample_weights=share_BQAS4.reshape(-1, samples * NEAREST),
    )
    return out_RD.view(batch, queries, heads, width).to(value_BNAD.dtype)


def _cell(location_2: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """Canvas index (int64) of the cell that locations [..., 2] round to, clamped to the canvas."""
    height, width = canvas_hw
    x, y = torch.nan_to_num(location_2).round().unbind(-1)
    return y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()


def _distance(offset_2: Tensor) -> Tensor:
    """Length of offsets [..., 2]; its gradient is 0 where it is 0."""
    squared = offset_2.square().sum(-1)
    at_token = squared == 0
    return squared.masked_fill(at_token, 1.0).sqrt().masked_fill(at_token, 0.0)


def _take(rows_BNE: Tensor, index_B: Tensor) -> Tensor:
    """Rows of each image by an index of any shape [B, ...]; gives [B, ..., E]."""
    batch, _, width = rows_BNE.shape
    flat_B1 = index_B.reshape(batch, -1, 1).expand(-1, -1, width)
    return torch.gather(rows_BNE, 1, flat_B1).view(*index_B.shape, width)
