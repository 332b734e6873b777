"""Between two stages: which tokens survive, and what they take along (method section 3.4 and 3.6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from affmae_engine.model.initialise import STD, linear
from affmae_engine.model.norm import LayerNorm
from affmae_engine.model.patches import take_rows
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.token_merging import merge_tokens, select_survivors, token_scores


def survivor_count(tokens: int, keep: float) -> int:
    """floor(keep * tokens), at least 1; the small term undoes the rounding of decimal shares such as 0.29 * 100."""
    return max(1, math.floor(keep * tokens + 1e-9))


class ClusterMerging(nn.Module):
    """Learned scores choose the survivors; every survivor gathers its neighbourhood, weighted by place and score."""

    def __init__(self, dim: int, next_dim: int, keep: float, backend: str) -> None:
        super().__init__()
        self.keep, self.backend = keep, backend
        self.score = linear(dim, 1)
        # PyTorch's own start: with a zero bias a survivor would give its own features no weight at all.
        self.position = nn.Linear(5, 4)
        self.position_norm = nn.LayerNorm(4, eps=1e-5)
        self.norm = LayerNorm(4 * dim)
        self.reduction = linear(4 * dim, next_dim)

    def forward(self, feat_BNC: Tensor, neighbourhoods: Neighbourhoods) -> tuple[Tensor, Tensor]:
        """Returns the survivors' features [B, K, C'] and their rows (int64 [B, K])."""
        score_BN = token_scores(feat_BNC, self.score.weight, self.score.bias, backend=self.backend)
        count = survivor_count(feat_BNC.shape[1], self.keep)
        survivors_BK = select_survivors(score_BN, neighbourhoods, count, backend=self.backend)
        z_BK4C = merge_tokens(
            feat_BNC,
            score_BN,
            survivors_BK,
            neighbourhoods,
            self.position.weight,
            self.position.bias,
            self.position_norm.weight,
            self.position_norm.bias,
            backend=self.backend,
        )
        return self.reduction(self.norm(z_BK4C)), survivors_BK


class NormMerging(nn.Module):
    """Variant `l2norm`: the tokens of largest norm are marked before the last block and alone go on after it."""

    def __init__(self, dim: int, next_dim: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.mark = nn.Parameter(torch.empty(dim))
        self.norm = LayerNorm(dim)
        self.reduction = linear(dim, next_dim)
        nn.init.trunc_normal_(self.mark, std=STD)

    def select(self, feat_BNC: Tensor, neighbourhoods: Neighbourhoods) -> tuple[Tensor, Tensor]:
        """Returns the features with the mark added to the survivors, and the survivors' rows (int64 [B, K])."""
        norm_BN = feat_BNC.detach().to(self.mark.dtype).square().sum(-1)
        survivors_BK = select_survivors(norm_BN, neighbourhoods, survivor_count(feat_BNC.shape[1], self.keep))
        marked_BN = torch.zeros_like(norm_BN).scatter(1, survivors_BK, 1.0)
        return feat_BNC + marked_BN[..., None] * self.mark, survivors_BK

    def forward(self, feat_BNC: Tensor, survivors_BK: Tensor) -> Tensor:
        """The survivors' features, [B, K, C']."""
        reduced_BKC: Tensor = self.reduction(self.norm(take_rows(feat_BNC, survivors_BK)))
        return reduced_BKC
