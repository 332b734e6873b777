"""The encoder: four stages on a shrinking set of points that keep their place on the canvas (method section 3).

Unusual: there is no grid after the stem. Every stage sorts its tokens into clusters (so the order in which they come
does not matter), works on neighbourhoods of clusters, and hands on the survivors with their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from affmae_engine.config import ModelConfig
from affmae_engine.model.block import Block
from affmae_engine.model.fused_blocks import run_blocks
from affmae_engine.model.merging import ClusterMerging, NormMerging
from affmae_engine.model.norm import LayerNorm
from affmae_engine.model.patches import cell_positions, take_rows
from affmae_engine.model.sizes import SIZES, Size
from affmae_engine.model.stem import Stem
from affmae_kernels.neighbourhoods import build_neighbourhoods


@dataclass(frozen=True)
class StageOutput:
    """What the decoder sees of a stage."""

    feat_BNC: Tensor
    """LayerNorm of the stage's last features."""
    pos_BN2: Tensor
    """int32 (x, y) cells of the tokens."""


class Stage(nn.Module):
    """Blocks on one set of tokens, then the merging into the next stage's set (none after the last stage)."""

    def __init__(self, config: ModelConfig, size: Size, index: int, drop_path: list[float], backend: str) -> None:
        super().__init__()
        dim, heads = size.dims[index], size.heads[index]
        self.cluster_size, self.neighbours, self.backend = config.cluster_size, config.neighbours, backend
        self.blocks = nn.ModuleList(Block(dim, heads, size.mlp_ratio, rate, backend) for rate in drop_path)
        self.norm = LayerNorm(dim)
        self.merge: ClusterMerging | NormMerging | None = None
        if index + 1 < len(size.dims):
            if config.merging == "cluster":
                self.merge = ClusterMerging(dim, size.dims[index + 1], config.merge_keep, backend)
            else:
                self.merge = NormMerging(dim, size.dims[index + 1], config.merge_keep)

    def forward(
        self, feat_BNC: Tensor, pos_BN2: Tensor, canvas_hw: tuple[int, int]
    ) -> tuple[StageOutput, Tensor, Tensor]:
        """Returns the stage's output, and the features and positions of the tokens that go on."""
        order_BN, near = build_neighbourhoods(
            pos_BN2, canvas_hw, cluster_size=self.cluster_size, neighbours=self.neighbours, backend=self.backend
        )
        feat_BNC = take_rows(feat_BNC, order_BN)
        survivors_BK: Tensor | None = None
        if isinstance(self.merge, NormMerging):
            for block in self.blocks[:-1]:
                feat_BNC = block(feat_BNC, near)
            feat_BNC, survivors_BK = self.merge.select(feat_BNC, near)
            feat_BNC = self.blocks[-1](feat_BNC, near)
            normed_BNC = self.norm(feat_BNC)
        else:
            normed_BNC, feat_BNC = run_blocks(self.blocks, self.norm, feat_BNC, near, self.backend)
        output = StageOutput(normed_BNC, near.pos_BN2)
        if self.merge is None:
            return output, feat_BNC, near.pos_BN2
        if isinstance(self.merge, NormMerging):
            assert survivors_BK is not None
            feat_BNC = self.merge(feat_BNC, survivors_BK)
        else:
            feat_BNC, survivors_BK = self.merge(feat_BNC, near)
        return output, feat_BNC, take_rows(near.pos_BN2, survivors_BK)


class Encoder(nn.Module):
    """Stem and stages."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        size = SIZES[config.size]
        self.patch = config.patch_size
        self.stem = Stem(config.channels, size.dims[0], config.patch_size)
        blocks = sum(size.depths)
        rates = [config.drop_path * block / (blocks - 1) for block in range(blocks)]
        self.stages = nn.ModuleList()
        for index, depth in enumerate(size.depths):
            self.stages.append(Stage(config, size, index, rates[:depth], backend))
            rates = rates[depth:]

    def forward(self, image_BIHW: Tensor, visible_BV: Tensor | None) -> list[StageOutput]:
        """Encodes the visible patches.

        Args:
            image_BIHW: normalised image; the patch edge divides both sides.
            visible_BV: int64 canvas indices in any order; None: all.

        Returns:
            the outputs of the stages, finest first.
        """
        batch, _, height, width = image_BIHW.shape
        canvas_hw = height // self.patch, width // self.patch
        feat_BNC = self.stem(image_BIHW, visible_BV)
        if visible_BV is None:
            visible_BV = torch.arange(canvas_hw[0] * canvas_hw[1], device=image_BIHW.device).expand(batch, -1)
        pos_BN2 = cell_positions(visible_BV, canvas_hw)
        outputs: list[StageOutput] = []
        for stage in self.stages:
            output, feat_BNC, pos_BN2 = stage(feat_BNC, pos_BN2, canvas_hw)
            outputs.append(output)
        return outputs
