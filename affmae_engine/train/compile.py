"""ViT-MAE's encoder and decoder, compiled: a residual and the norm of the next block become one pass.

AFFMAE is not compiled: its operations are fused by hand (`affmae_kernels`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affmae_engine.model.vit_mae import VitDecoder, VitEncoder

GRAPHS_OF_A_FUNCTION = 64
"""Every model and micro-batch size of a process has its own; PyTorch's default of 8 would not do."""


def compile_vit(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile encoder and decoder of a ViT for training, in place; other models are left as they are.

    In eval mode they run as written: evaluations have other shapes, and would compile each of them for one use.

    Args:
        model: any model.
        backend: of torch.compile.
    """
    use_cache_folder()
    for module in model.modules():
        if isinstance(module, VitEncoder | VitDecoder):
            setattr(module, "forward", _compiled_in_training(module, backend))  # noqa: B010 (mypy: it is a method)


def use_cache_folder() -> Path:
    """Let PyTorch keep what it compiles in the user's cache folder, not in /tmp, which many machines empty.

    Returns:
        The folder; another one if the user has set TORCHINDUCTOR_CACHE_DIR.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "affmae" / "inductor")))


def _compiled_in_training(module: VitEncoder | VitDecoder, backend: str | Callable[..., Any]) -> Any:
    plain = module.forward
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_OF_A_FUNCTION)
    compiled = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)

    @functools.wraps(plain)
    def forward(*arguments: Any) -> Tensor:
        return compiled(*arguments) if module.training else plain(*arguments)

    return forward
