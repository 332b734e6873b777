"""Compiles the parts of a model that repeat, so that elementwise work is fused into few kernels.

Unusual: not the whole model is compiled but its blocks. Blocks of one stage share one graph, so a network of 25 blocks
and 4 decoder steps costs a dozen small compilations instead of one of minutes, and what lies between (orders, tables,
look-ups) stays plain. The operations of `affmae_kernels` are opaque to the compiler. A ViT has nothing in between: its
encoder and its decoder are compiled as they are, so that a residual and the norm of the next block become one pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from affmae_engine.model.block import Block
from affmae_engine.model.decoder import DecoderStep, SineEmbedding
from affmae_engine.model.encoder import Stage
from affmae_engine.model.heads import Head
from affmae_engine.model.encoder import ClusterMerging, NormMerging
from affmae_engine.model.encoder import Stem
from affmae_engine.model.vit_mae import VitDecoder, VitEncoder

REGIONS = (Stem, Block, ClusterMerging, NormMerging, SineEmbedding, DecoderStep, Head, VitEncoder, VitDecoder)
GRAPHS_OF_A_FUNCTION = 64
"""Stages differ in width and number of tokens; PyTorch's default of 8 graphs of one function would not do."""

STEPS_WORTH_COMPILING = 2000
"""Length of a run. Compiling costs two minutes the first time, and saves some 50 ms a step (base, 512 px, 32 images,
H200)."""


def worth_compiling(asked: bool | Literal["auto"], *, fast: bool, steps: int, so_far: bool | None) -> bool:
    """Whether to compile the steps of a run on a card.

    Compiled code rounds otherwise and draws other dropout masks, so a resumed run must decide as it did when it began:
    by its whole length, not by the steps that are left.

    Args:
        asked: `kernels.compile`.
        fast: whether the kernels of this project run.
        steps: of the whole run.
        so_far: whether steps of this run were compiled; None when it is new, or that is not known.
    """
    if asked != "auto":
        return asked
    return fast and (steps >= STEPS_WORTH_COMPILING if so_far is None else so_far)


def compile_regions(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles the regions of `model` in place, for static shapes; returns how many there are.

    Names of parameters stay what they were. Compilation happens in the first forward pass of each. `backend` is
    torch.compile's.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_OF_A_FUNCTION)
    regions: list[nn.Module] = [module for module in model.modules() if isinstance(module, REGIONS)]
    regions += [module.norm for module in model.modules() if isinstance(module, Stage)]
    for region in regions:
        region.compile(dynamic=False, fullgraph=True, backend=backend)
    return len(regions)
