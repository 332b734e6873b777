"""The encoder's block: cluster attention and an MLP, pre-norm, with stochastic depth (method section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from affmae_engine.model.initialise import STD, linear
from affmae_engine.model.norm import LayerNorm
from affmae_kernels.cluster_attention import cluster_attention
from affmae_kernels.neighbourhoods import Neighbourhoods


class DropPath(nn.Module):
    """Drops a residual branch for whole images while training and rescales the kept ones.

    The rate is a tensor, so that the blocks of a stage, which differ in it alone, share one compiled graph.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, branch_BNC: Tensor) -> Tensor:
        """Returns the branch, or zeros for the dropped images."""
        if not self.training:
            return branch_BNC
        kept_B11 = torch.rand(branch_BNC.shape[0], 1, 1, device=branch_BNC.device) < self.keep
        return branch_BNC * (kept_B11 / self.keep).to(branch_BNC.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rate={self.rate:.3f}"


class ClusterAttention(nn.Module):
    """Projections and parameters around `affmae_kernels.cluster_attention`."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads, self.backend = heads, backend
        self.qkv = linear(dim, 3 * dim)
        self.output = linear(dim, dim)
        self.blank_key = nn.Parameter(torch.empty(heads, dim // heads))
        self.blank_value = nn.Parameter(torch.empty(heads, dim // heads))
        self.position = linear(5, heads)
        nn.init.trunc_normal_(self.blank_key, std=STD)
        nn.init.trunc_normal_(self.blank_value, std=STD)

    def forward(self, feat_BNC: Tensor, neighbourhoods: Neighbourhoods) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        qkv_BN3AD = self.qkv(feat_BNC).unflatten(-1, (3, self.heads, -1))
        out_BNAD = cluster_attention(
            qkv_BN3AD,
            neighbourhoods,
            self.blank_key,
            self.blank_value,
            self.position.weight,
            self.position.bias,
            backend=self.backend,
        )
        out_BNC: Tensor = self.output(out_BNAD.flatten(2))
        return out_BNC


class Block(nn.Module):
    """x + DropPath(attention(LN(x))), then x + DropPath(MLP(LN(x)))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, backend: str) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = LayerNorm(dim)
        self.attention = ClusterAttention(dim, heads, backend)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(linear(dim, hidden), nn.GELU(), linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, feat_BNC: Tensor, neighbourhoods: Neighbourhoods) -> Tensor:
        """[B, N, C] -> [B, N, C], rows in the order of `neighbourhoods`."""
        feat_BNC = feat_BNC + self.drop_path(self.attention(self.norm1(feat_BNC), neighbourhoods))
        return feat_BNC + self.drop_path(self.mlp(self.norm2(feat_BNC)))
