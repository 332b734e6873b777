"""Dtypes of features and of arithmetic, and working through rows in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_ELEMENTS = 2**28
"""Largest temporary of one tile, in elements (1 GiB in fp32)."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for fp32, bf16 and fp16 features; float64 for float64 (gradient checks)."""
    return torch.promote_types(tensor.dtype, torch.float32)


def feature_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that features have in an operation: autocast's where that is on, else the tensor's own.

    Tensors on the meta device stand for CUDA tensors (see `precompile.rehearse`).
    """
    kind = "cuda" if tensor.is_meta else tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Inside, operations compute in the dtypes of their arguments."""
    return torch.autocast("cuda" if tensor.is_meta else tensor.device.type, enabled=False)


def in_tiles(rows: int, elements_per_row: int, compute: Callable[[slice], Tensor], dim: int) -> Tensor:
    """Concatenates `compute(slice of rows)` along `dim`, every tile's temporaries at most `TILE_ELEMENTS`.

    One tile is computed as it is. Of several, each is recomputed in the backward pass instead of kept, so that memory
    does not grow with the number of tiles.
    """
    size = max(1, TILE_ELEMENTS // max(1, elements_per_row))
    if size >= rows:
        return compute(slice(0, rows))
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    parts = [
        checkpoint(compute, tile, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else compute(tile)
        for tile in tiles
    ]
    return torch.cat(parts, dim)


def layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis, computed in `compute_dtype` and rounded to the dtype of x."""
    dtype = compute_dtype(x)
    return F.layer_norm(x.to(dtype), weight_C.shape, weight_C.to(dtype), bias_C.to(dtype), eps).to(x.dtype)


def linear(x: Tensor, weight_FC: Tensor, bias_F: Tensor) -> Tensor:
    """A linear layer in the dtype of x, whatever the dtype of its parameters."""
    return F.linear(x, weight_FC.to(x.dtype), bias_F.to(x.dtype))
