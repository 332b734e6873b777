"""Point attention in plain PyTorch: a brute-force table with whole-number keys, and a weighted bag of value rows.

Memory: the table builds one key per (cell, token) pair in tiles of at most `TILE_ELEMENTS / 4` keys. The attention
keeps its weights, [B, Q, H, S, 4] fp32 and a few temporaries of that size (512 px: 0.8 MB an image each), and never
gathers the value rows themselves: `embedding_bag` sums them on the way. On CUDA the gradient of the values is a sum
in an order that sorting fixes.

Axes: B batch, N tokens, H heads, D head width, Q queries, S samples, T canvas cells, R = S * 4 rows mixed per head.
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
    canvas_h, canvas_w = canvas_hw
    batch, tokens, _ = pos_BN2.shape
    cells = canvas_h * canvas_w
    # int32 where the largest key fits halves the traffic; same result.
    dtype = torch.int32 if (canvas_h**2 + canvas_w**2) * cells < 2**31 else torch.int64
    token_x_BN, token_y_BN = pos_BN2.to(dtype).unbind(-1)
    canvas_BN = token_y_BN * canvas_w + token_x_BN

    def search(start: int, stop: int) -> Tensor:
        cell_t = torch.arange(start, stop, device=pos_BN2.device, dtype=dtype)
        x_t1, y_t1 = (cell_t % canvas_w)[:, None], (cell_t // canvas_w)[:, None]
        key_BtN = (token_x_BN[:, None] - x_t1).square_() + (token_y_BN[:, None] - y_t1).square_()
        key_BtN = key_BtN.mul_(cells).add_(canvas_BN[:, None])
        return key_BtN.topk(min(NEAREST, tokens), dim=-1, largest=False, sorted=True).indices.int()

    step = max(1, TILE_ELEMENTS // 4 // (batch * tokens))
    table_BTn = torch.cat([search(t, min(t + step, cells)) for t in range(0, cells, step)], 1)
    return F.pad(table_BTn, (0, NEAREST - table_BTn.shape[-1]), value=-1)


def point_attention(
    value_BNHD: Tensor,
    pos_BN2: Tensor,
    table_BT4: Tensor,
    query_pos_BQ2: Tensor,
    offset_BQHS2: Tensor,
    logit_BQHS: Tensor,
    tau: Tensor,
    canvas_hw: tuple[int, int],
) -> Tensor:
    """See the package for the formula and the shapes."""
    dtype = compute_dtype(value_BNHD)
    batch, tokens, heads, width = value_BNHD.shape
    _, queries, _, samples = logit_BQHS.shape
    # Where each sample lies, and the tokens nearest to its cell.
    location_BQHS2 = query_pos_BQ2[:, :, None, None].to(dtype) + offset_BQHS2.to(dtype)
    row_BQHS4 = _take(table_BT4, _cell(location_BQHS2.detach(), canvas_hw))
    real_BQHS4 = row_BQHS4 >= 0
    row_BQHS4 = row_BQHS4.clamp(min=0).long()
    # Weight of each token: softmax over the distances, times softmax over the samples.
    token_BQHS42 = _take(pos_BN2, row_BQHS4).to(dtype)
    distance_BQHS4 = _distance(location_BQHS2[..., None, :] - token_BQHS42)
    closeness_BQHS4 = (-tau.to(dtype).relu() * distance_BQHS4).masked_fill(~real_BQHS4, float("-inf"))
    share_BQHS4 = closeness_BQHS4.softmax(-1) * logit_BQHS.to(dtype).softmax(-1)[..., None]
    # Weighted sum of the value rows.
    head_H11 = torch.arange(heads, device=value_BNHD.device)[:, None, None]
    image_B1111 = torch.arange(batch, device=value_BNHD.device)[:, None, None, None, None]
    flat_BQHS4 = (image_B1111 * tokens + row_BQHS4) * heads + head_H11
    out_RD = F.embedding_bag(
        flat_BQHS4.reshape(-1, samples * NEAREST),
        value_BNHD.to(dtype).reshape(-1, width),
        mode="sum",
        per_sample_weights=share_BQHS4.reshape(-1, samples * NEAREST),
    )
    return out_RD.view(batch, queries, heads, width).to(value_BNHD.dtype)


def _cell(location_2: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """Canvas index (int64) of the cell that locations [..., 2] round to, clamped to the canvas."""
    canvas_h, canvas_w = canvas_hw
    x, y = torch.nan_to_num(location_2).round().unbind(-1)
    return y.clamp(0, canvas_h - 1).long() * canvas_w + x.clamp(0, canvas_w - 1).long()


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
