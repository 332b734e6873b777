"""The encoder: four stages on a shrinking set of tokens that keep their place on the canvas (method sections 2 and 3).

Notable: there is no grid after the stem. The tokens of a stage are sorted into clusters of nearby tokens before they
are computed, so a cluster is a run of consecutive rows; the survivors of a stage are sorted for the next one before
they gather their neighborhoods.

Axes: B batch, I image channels, H W image, V visible tokens, N tokens of a stage, K survivors, C channels, S branches.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.patches import cell_positions, take_rows
from affmae_engine.model.sizes import Size, size_of
from affmae_kernels.encoder_blocks import BlockWeights, encoder_blocks
from affmae_kernels.neighbourhoods import Neighbourhoods, build_neighbourhoods
from affmae_kernels.norm_linear import norm_linear
from affmae_kernels.stem import stem
from affmae_kernels.token_merging import merge_tokens, select_survivors, token_scores

STD = 0.02
"""Of the truncated normal that linear layers start from where the method does not say, as in transformers."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with truncated-normal weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The parameters of a layer that comes out of a container, where its type is lost."""
    return cast(Tensor, layer.weight), cast(Tensor, layer.bias)


class Stem(nn.Module):
    """Patch embedding: 3x3 convolutions of stride 2, widths dim/2, ..., dim/2, dim; LayerNorm and GELU between them."""

    def __init__(self, channels: int, dim: int, patch: int, backend: str) -> None:
        super().__init__()
        widths = [channels] + [dim // 2] * (int(math.log2(patch)) - 1) + [dim]
        self.patch, self.backend = patch, backend
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        for conv in self.convs:
            weight, bias = weight_and_bias(conv)
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            nn.init.zeros_(bias)

    def forward(self, image_BIHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Features [B, V, C] of the visible patches; nothing of a masked patch reaches them."""
        convs = [weight_and_bias(conv) for conv in self.convs]
        norms = [weight_and_bias(norm) for norm in self.norms]
        return stem(image_BIHW, visible_BV, convs, norms, self.patch, backend=self.backend)


class ClusterAttention(nn.Module):
    """Parameters of the attention to a token's neighborhood and one learned blank token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.qkv = linear(dim, 3 * dim)
        self.output = linear(dim, dim)
        self.blank_key = nn.Parameter(torch.empty(heads, dim // heads))
        self.blank_value = nn.Parameter(torch.empty(heads, dim // heads))
        self.position = linear(5, heads)
        nn.init.trunc_normal_(self.blank_key, std=STD)
        nn.init.trunc_normal_(self.blank_value, std=STD)


class Block(nn.Module):
    """Parameters of x + DropPath(attention(LN(x))), then x + DropPath(MLP(LN(x))); see `encoder_blocks`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ClusterAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(linear(dim, hidden), nn.GELU(), linear(hidden, dim))

    def weights(self) -> BlockWeights:
        """The parameters as `encoder_blocks` takes them."""
        attention = self.attention
        hidden, _, last = self.mlp
        return BlockWeights(
            self.norm1.weight, self.norm1.bias, attention.qkv.weight, attention.qkv.bias, attention.position.weight,
            attention.position.bias, attention.blank_key, attention.blank_value, attention.output.weight,
            attention.output.bias, self.norm2.weight, self.norm2.bias, *weight_and_bias(hidden), *weight_and_bias(last),
        )  # fmt: skip


def survivor_count(tokens: int, keep: float) -> int:
    """floor(keep * tokens), at least 1; the small term undoes the rounding of decimal shares such as 0.29 * 100."""
    return max(1, math.floor(keep * tokens + 1e-9))


class ClusterMerging(nn.Module):
    """Learned scores choose the survivors; every survivor gathers its neighborhood, weighted by place and score."""

    def __init__(self, dim: int, next_dim: int, keep: float, backend: str) -> None:
        super().__init__()
        self.keep, self.backend = keep, backend
        self.score = linear(dim, 1)
        # PyTorch's own start: with a zero bias a survivor would give its own features no weight at all.
        self.position = nn.Linear(5, 4)
        self.position_norm = nn.LayerNorm(4)
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = linear(4 * dim, next_dim)

    def select(self, feat_BNC: Tensor, near: Neighbourhoods) -> tuple[Tensor, Tensor]:
        """Scores [B, N] and the survivors' rows (int64 [B, K])."""
        score_BN = token_scores(feat_BNC, self.score.weight, self.score.bias, backend=self.backend)
        count = survivor_count(feat_BNC.shape[1], self.keep)
        return score_BN, select_survivors(score_BN, near, count, backend=self.backend)

    def forward(self, feat_BNC: Tensor, score_BN: Tensor, survivors_BK: Tensor, near: Neighbourhoods) -> Tensor:
        """The survivors' features, [B, K, C']."""
        position, norm = self.position, self.position_norm
        z_BK4C = merge_tokens(
            feat_BNC, score_BN, survivors_BK, near, position.weight, position.bias, norm.weight, norm.bias,
            backend=self.backend,
        )  # fmt: skip
        reduction = self.reduction
        return norm_linear(
            z_BK4C, self.norm.weight, self.norm.bias, reduction.weight, reduction.bias, backend=self.backend
        )


class NormMerging(nn.Module):
    """Variant `l2norm`: the tokens of largest norm are marked before the last block, and they alone go on after it."""

    def __init__(self, dim: int, next_dim: int, keep: float, backend: str) -> None:
        super().__init__()
        self.keep, self.backend = keep, backend
        self.mark = nn.Parameter(torch.empty(dim))
        self.norm = nn.LayerNorm(dim)
        self.reduction = linear(dim, next_dim)
        nn.init.trunc_normal_(self.mark, std=STD)

    def select(self, feat_BNC: Tensor, near: Neighbourhoods) -> tuple[Tensor, Tensor]:
        """The features with the mark added to the survivors, and the survivors' rows (int64 [B, K])."""
        norm_BN = feat_BNC.detach().to(self.mark.dtype).square().sum(-1)
        count = survivor_count(feat_BNC.shape[1], self.keep)
        survivors_BK = select_survivors(norm_BN, near, count, backend=self.backend)
        marked_BN1 = torch.zeros_like(norm_BN).scatter(1, survivors_BK, 1.0)[..., None].to(feat_BNC.dtype)
        return feat_BNC + marked_BN1 * self.mark.to(feat_BNC.dtype), survivors_BK

    def forward(self, feat_BNC: Tensor, survivors_BK: Tensor) -> Tensor:
        """The survivors' features, [B, K, C']."""
        kept_BKC, reduction = take_rows(feat_BNC, survivors_BK), self.reduction
        return norm_linear(
            kept_BKC, self.norm.weight, self.norm.bias, reduction.weight, reduction.bias, backend=self.backend
        )


@dataclass(frozen=True)
class StageOutput:
    """What the decoder sees of a stage."""

    feat_BNC: Tensor
    """LayerNorm of the stage's last features."""
    pos_BN2: Tensor
    """int32 (x, y) cells of the tokens."""


class Stage(nn.Module):
    """Blocks on one set of tokens, then the merging into the next stage's set (none after the last stage)."""

    keep_S1: Tensor

    def __init__(self, config: ModelConfig, size: Size, index: int, drop_path: list[float], backend: str) -> None:
        super().__init__()
        dim = size.dims[index]
        self.cluster_size, self.neighbours, self.backend = config.cluster_size, config.neighbours, backend
        self.blocks = nn.ModuleList(Block(dim, size.heads[index], size.mlp_ratio, rate) for rate in drop_path)
        self.norm = nn.LayerNorm(dim)
        keep_S = 1 - torch.tensor(drop_path).repeat_interleave(2)  # a block has two branches
        self.register_buffer("keep_S1", keep_S[:, None], persistent=False)
        self.merge: ClusterMerging | NormMerging | None = None
        if index + 1 < len(size.dims):
            merging = ClusterMerging if config.merging == "cluster" else NormMerging
            self.merge = merging(dim, size.dims[index + 1], config.merge_keep, backend)

    def forward(self, feat_BNC: Tensor, near: Neighbourhoods) -> tuple[StageOutput, Tensor, Neighbourhoods]:
        """Returns the stage's output, and the features and neighborhoods of the tokens that go on."""
        scale_SB = self._branch_scales(len(feat_BNC))
        if isinstance(self.merge, NormMerging):
            # All blocks but the last, the choice of survivors, and the last block on all tokens.
            before_SB, last_SB = (None, None) if scale_SB is None else (scale_SB[:-2], scale_SB[-2:])
            if len(self.blocks) > 1:
                _, feat_BNC = self._run(self.blocks[:-1], feat_BNC, near, before_SB)
            feat_BNC, survivors_BK = self.merge.select(feat_BNC, near)
            normed_BNC, feat_BNC = self._run(self.blocks[-1:], feat_BNC, near, last_SB)
            near_next, survivors_BK = self.sorted(take_rows(near.pos_BN2, survivors_BK), near.canvas_hw, survivors_BK)
            return StageOutput(normed_BNC, near.pos_BN2), self.merge(feat_BNC, survivors_BK), near_next
        # Blocks on the neighborhoods of this stage.
        normed_BNC, feat_BNC = self._run(self.blocks, feat_BNC, near, scale_SB)
        output = StageOutput(normed_BNC, near.pos_BN2)
        if self.merge is None:
            return output, feat_BNC, near
        # The tokens of highest score survive; sorted for the next stage, they gather their neighborhoods.
        score_BN, survivors_BK = self.merge.select(feat_BNC, near)
        near_next, survivors_BK = self.sorted(take_rows(near.pos_BN2, survivors_BK), near.canvas_hw, survivors_BK)
        return output, self.merge(feat_BNC, score_BN, survivors_BK, near), near_next

    def sorted(self, pos_BN2: Tensor, canvas_hw: tuple[int, int], index_BN: Tensor) -> tuple[Neighbourhoods, Tensor]:
        """The neighborhoods of tokens at `pos_BN2`, and `index_BN`, one number per token, in their order."""
        order_BN, near = build_neighbourhoods(
            pos_BN2, canvas_hw, cluster_size=self.cluster_size, neighbours=self.neighbours, backend=self.backend
        )
        return near, torch.gather(index_BN, 1, order_BN)

    def _run(
        self, blocks: nn.ModuleList, feat_BNC: Tensor, near: Neighbourhoods, scale_SB: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """LN(x) and x, the features after the blocks."""
        return encoder_blocks(
            feat_BNC, [cast(Block, block).weights() for block in blocks], self.norm.weight, self.norm.bias, near,
            branch_scale_SB=scale_SB, backend=self.backend,
        )  # fmt: skip

    def _branch_scales(self, images: int) -> Tensor | None:
        """Stochastic depth: per branch and image 0, or 1 / (1 - rate); None where nothing is dropped."""
        if not self.training or not any(block.drop_path for block in self.blocks):
            return None
        drawn_SB = torch.rand(len(self.keep_S1), images, device=self.keep_S1.device)
        return (drawn_SB < self.keep_S1) / self.keep_S1


class Encoder(nn.Module):
    """Stem and stages."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        size = size_of(config)
        self.patch = config.patch_size
        self.stem = Stem(config.channels, size.dims[0], config.patch_size, backend)
        blocks = sum(size.depths)
        rates = [config.drop_path * block / max(1, blocks - 1) for block in range(blocks)]
        self.stages = nn.ModuleList()
        for index, depth in enumerate(size.depths):
            self.stages.append(Stage(config, size, index, rates[:depth], backend))
            rates = rates[depth:]

    def forward(self, image_BIHW: Tensor, visible_BV: Tensor) -> list[StageOutput]:
        """Encodes the visible patches.

        Args:
            image_BIHW: normalized image; the patch edge divides both sides.
            visible_BV: int64 canvas indices in any order.

        Returns:
            the outputs of the stages, finest first.
        """
        canvas_hw = image_BIHW.shape[-2] // self.patch, image_BIHW.shape[-1] // self.patch
        # Sort the visible patches into clusters, then embed them in that order.
        first = cast(Stage, self.stages[0])
        near, visible_BV = first.sorted(cell_positions(visible_BV, canvas_hw), canvas_hw, visible_BV)
        feat_BNC = self.stem(image_BIHW, visible_BV)
        outputs: list[StageOutput] = []
        for stage in self.stages:
            output, feat_BNC, near = stage(feat_BNC, near)
            outputs.append(output)
        return outputs


def encoder_depth(parameter_name: str, size: Size) -> int | None:
    """Depth of a parameter for layer-wise learning-rate decay, counted from the image.

    Returns:
        0 for the stem, 1, 2, ... for the blocks over all stages (a stage's norm and merging belong to its last
        block), None for decoder and heads, which have no decay.

    Raises:
        ValueError: for an encoder parameter of an unknown kind.
    """
    if not parameter_name.startswith("encoder."):
        return None
    if parameter_name.startswith("encoder.stem."):
        return 0
    match = re.match(r"encoder\.stages\.(\d+)\.(?:blocks\.(\d+)|norm|merge)\.", parameter_name)
    if match is None:
        raise ValueError(f"unknown encoder parameter {parameter_name!r}")
    stage = int(match[1])
    block = size.depths[stage] - 1 if match[2] is None else int(match[2])
    return 1 + sum(size.depths[:stage]) + block
