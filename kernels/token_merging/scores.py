"""Scores of the tokens, sigmoid(linear(f)), by one pass over the features forward and one backward.

    s_i = sigmoid(w . f_i + b),   dl_i = ds_i s_i (1 - s_i),   df_i = dl_i w,   dw = sum_i dl_i f_i,   db = sum_i dl_i

Axes: N rows of all images, C channels, RB rows of a tile, CB >= C channels of a tile, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums

TILE = 4096
"""Features of a tile: 32 registers in each of 128 threads."""
PROGRAMS = 528
"""Most programs of the backward pass; each leaves a line of partial sums."""


@triton.jit(do_not_specialize=["N"])  # that C is a multiple of 16 makes loads wide
def _fwd_kernel(FEAT, WEIGHT, BIAS, SCORE, N, C, RB: tl.constexpr, CB: tl.constexpr):
    """One program: the scores of RB rows."""
    row = (tl.program_id(0) * RB + tl.arange(0, RB)).to(tl.int64)
    c = tl.arange(0, CB)
    real = (row < N)[:, None] & (c < C)[None, :]
    # [RB, CB]
    feat = tl.load(FEAT + row[:, None] * C + c[None, :], mask=real, other=0.0).to(tl.float32)
    # [CB]
    weight = tl.load(WEIGHT + c, mask=c < C, other=0.0)
    logit = tl.sum(feat * weight[None, :], 1) + tl.load(BIAS)
    tl.store(SCORE + row, 1 / (1 + tl.exp(-logit)), mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _bwd_kernel(FEAT, WEIGHT, SCORE, DSCORE, DFEAT, PART, N, C, LINE, RB: tl.constexpr, CB: tl.constexpr):
    """One program: every P-th tile of rows; the sums for dw and db go to a row of PART [P, LINE]."""
    c = tl.arange(0, CB)
    # [CB]
    weight = tl.load(WEIGHT + c, mask=c < C, other=0.0)
    dweight = tl.zeros([RB, CB], tl.float32)
    dbias = tl.zeros([RB], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, RB), tl.num_programs(0)):
        row = (tile * RB + tl.arange(0, RB)).to(tl.int64)
        real = (row < N)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        # [RB]
        score = tl.load(SCORE + row, mask=row < N, other=0.0)
        dscore = tl.load(DSCORE + row, mask=row < N, other=0.0)
        # [RB, CB]
        feat = tl.load(FEAT + at, mask=real, other=0.0).to(tl.float32)
        dlogit = dscore * score * (1 - score)
        tl.store(DFEAT + at, (dlogit[:, None] * weight[None, :]).to(DFEAT.dtype.element_ty), mask=real)
        dweight += dlogit[:, None] * feat
        dbias += dlogit
    part = PART + tl.program_id(0) * LINE
    tl.store(part + c, tl.sum(dweight, 0), mask=c < C)
    tl.store(part + C, tl.sum(dbias, 0))


def launch_config(channels: int) -> dict[str, int]:
    """Rows and channels of a tile, and warps."""
    block = max(16, triton.next_power_of_2(channels))
    return {"RB": max(1, TILE // block), "CB": block, "num_warps": 4}


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        feat, weight_C = feat.contiguous(), weight.contiguous().view(-1)
        score = torch.empty(feat.shape[:2], dtype=torch.float32, device=feat.device)
        config = launch_config(len(weight_C))
        _fwd_kernel[(triton.cdiv(score.numel(), config["RB"]),)](
            FEAT=feat, WEIGHT=weight_C, BIAS=bias, SCORE=score, N=score.numel(), C=len(weight_C), **config
        )
        ctx.save_for_backward(feat, weight_C, score)
        return score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feat, weight_C, score = ctx.saved_tensors
        channels, config = len(weight_C), launch_config(len(weight_C))
        dfeat = torch.empty_like(feat)
        programs = min(PROGRAMS, triton.cdiv(score.numel(), config["RB"]))
        line = 16 * triton.cdiv(channels + 1, 16)  # a multiple of 16 makes loads wide when the rows are summed
        part = torch.empty(programs, line, dtype=torch.float32, device=feat.device)
        _bwd_kernel[(programs,)](
            FEAT=feat, WEIGHT=weight_C, SCORE=score, DSCORE=dscore.contiguous(), DFEAT=dfeat, PART=part,
            N=score.numel(), C=channels, LINE=line, **config,
        )  # fmt: skip
        dweight_C, dbias_1 = column_sums(part)[: channels + 1].split([channels, 1])
        return dfeat, dweight_C.view(1, -1), dbias_1


def token_scores(feat_BNC: Tensor, weight_1C: Tensor, bias_1: Tensor) -> Tensor:
    """See the package; weight and bias are fp32."""
    return _TokenScores.apply(feat_BNC, weight_1C, bias_1)
